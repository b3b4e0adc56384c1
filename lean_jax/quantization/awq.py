"""AWQ: a weight's rows scaled before rounding, the more the larger their inputs are.

Lin et al. 2023 (arXiv:2306.00978), section 3.2: s = size ** alpha, size the mean |x| of an input,
alpha the one of a grid that leaves the smallest error of the products. Section 4's search of ranges
follows, with the error of the products too.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lean_jax.quantization import formats
from lean_jax.quantization.clip import check_clip, least_error
from lean_jax.quantization.equalization import broadcast, tidy
from lean_jax.quantization.error import least, product_error
from lean_jax.quantization.ranges import static_step
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Quantized
from lean_jax.weights.base import to_matrix
from lean_jax.weights.dense import check_dense

ALPHAS = np.linspace(0., 1., 20, endpoint=False, dtype=np.float32)     # section 3.2: a grid of 20
COLUMNS = 512           # of a weight, spread over it, whose products the scales are judged by


def awq(w, spec, stats, clip='mse'):
  """The weight in the format `spec`, its rows having been scaled by `awq_scales`.

  Args:
    w: Dense, of one layer.
    spec: a QuantSpec or its name.
    stats: calibration.Statistics of its inputs, with `second`.
    clip: 'mse' leaves out of a group's range what makes the error of its products smaller;
      'absmax' nothing.

  Raises:
    InputError: the weight is no float one, or an unknown scheme or clip.
  """
  spec = parse_spec(spec)
  check_clip(clip)
  check_dense(w, f'rounded to {spec} by awq')
  value, shrink = meta.unbox(w), 1.
  if clip == 'mse':
    shrink = _shrink(to_matrix(value, w.dims).astype(jnp.float32), stats.second, spec)
  return Quantized.of(value, spec, w.dims, w.axes, shrink, static_step(spec, stats))


@functools.partial(jax.jit, static_argnums=2)
def _shrink(matrix, second, spec):
  rows = matrix.shape[-2]
  return least_error(formats.grouped(matrix, spec), spec, rows, _of_groups(second, spec))


def _of_groups(second, spec):
  """The blocks [*e G g g] on the diagonal of [*e I I], the last filled with zeros."""
  I = second.shape[-1]
  group = spec.group or I
  more = -I % group
  *batch, _, _ = second.shape
  whole = jnp.pad(second, [(0, 0)] * len(batch) + [(0, more)] * 2)
  G = (I + more) // group
  whole = whole.reshape(*batch, G, group, G, group)
  return jnp.moveaxis(jnp.diagonal(whole, axis1=-4, axis2=-2), -1, -3)


@functools.partial(jax.jit, static_argnames='spec')
def awq_scales(matrices, stats, spec):
  """The scale of each input, [I]; the same for all experts.

  Args:
    matrices: the weights that see the input, [*e I O] each, float32.
    stats: the Statistics of each one's input.
    spec: the QuantSpec that they will be rounded to.
  """
  rows = sum(_total(s.rows) for s in stats)
  size = sum(_total(s.size, 1) for s in stats) / jnp.maximum(rows, 1)                 # [I]

  def error(alpha):
    s = tidy(size ** alpha)
    return sum(product_error(_some(rounded(w, s, spec) - w), given.second)
               for w, given in zip(matrices, stats))

  return tidy(size ** least(error, ALPHAS, jnp.float32(0)))


def _some(w):
  """At most COLUMNS columns, times what makes their sum of squares stand for that of all."""
  O = w.shape[-1]
  part = w[..., ::-(-O // COLUMNS)]
  return part * (O / part.shape[-1]) ** .5


def rounded(w, s, spec):
  """w [*e I O] as it is computed when rounded with its rows times s."""
  by = broadcast(s, w)[..., None]
  return formats.dequantize(*formats.quantize(w * by, spec), spec, jnp.float32) / by


def _total(x, kept=0):
  """Summed over all axes but the last `kept`."""
  return jnp.sum(x, axis=tuple(range(x.ndim - kept)))
