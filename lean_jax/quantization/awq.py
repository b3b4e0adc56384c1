"""AWQ: a weight's rows scaled before rounding, the more the larger their inputs are.

Lin et al. 2023 (arXiv:2306.00978), section 3.2: s = size ** alpha, size the mean |x| of an input,
alpha the one of a grid that leaves the smallest error of the products.
"""
import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.quantization import formats
from lean_jax.quantization.equalization import broadcast, tidy

ALPHAS = np.linspace(0., 1., 20, endpoint=False, dtype=np.float32)     # section 3.2: a grid of 20


def awq_scales(matrices, stats, spec):
  """The scale of each input, [I]; or [E I], of experts.

  Args:
    matrices: the weights that see the input, [*e I O] each, float32.
    stats: the Statistics of each one's input.
    spec: the QuantSpec that they will be rounded to.
  """
  rows = sum(_total(s.rows) for s in stats)
  size = sum(_total(s.size, 1) for s in stats) / jnp.maximum(rows, 1)                 # [I]

  def error(alpha):
    s = tidy(size ** alpha)
    return sum(product_error(w, rounded(w, s, spec), given.second)
               for w, given in zip(matrices, stats))

  def better(best, alpha):
    least, at = best
    found = error(alpha)
    return (jnp.minimum(found, least), jnp.where(found < least, alpha, at)), None
  (_, alpha), _ = jax.lax.scan(better, (jnp.float32(jnp.inf), jnp.float32(0)), jnp.asarray(ALPHAS))
  return tidy(size ** alpha)


def rounded(w, s, spec):
  """w [*e I O] as it is computed when rounded with its rows times s."""
  by = broadcast(s, w)[..., None]
  return formats.dequantize(*formats.quantize(w * by, spec), spec, jnp.float32) / by


def product_error(w, other, second):
  """The sum of squares of what products x (other - w) are, x having x x^T = second."""
  off = other - w
  return jnp.sum(off * (second @ off))


def _total(x, kept=0):
  """Summed over all axes but the last `kept`."""
  return jnp.sum(x, axis=tuple(range(x.ndim - kept)))
