"""SmoothQuant: activations with large channels made smooth, their size moved into the weights.

Xiao et al. 2022 (arXiv:2211.10438), equation 4: s = max|x| ** alpha / max|w| ** (1 - alpha) of each
channel; x / s and the rows of w times s are then rounded to eight bits, both.
"""
import functools

import jax
import jax.numpy as jnp

from lean_jax.quantization.codes import magnitude
from lean_jax.quantization.equalization import LEAST


@functools.partial(jax.jit, static_argnames='spec')
def smooth_scales(matrices, stats, spec, alpha=.5):
  """The scale of each input, [I].

  Args:
    matrices: the weights that see the input, [*e I O] each, float32.
    stats: the Statistics of each one's input.
    spec: the QuantSpec that they will be rounded to; the scales do not depend on it.
    alpha: how much of the difficulty moves into the weights, 0 to 1.
  """
  outer = lambda x: magnitude(x, tuple(range(x.ndim - 1)))
  top = magnitude(jnp.stack([outer(s.top) for s in stats]), 0)
  most = magnitude(jnp.stack([outer(magnitude(w, -1)) for w in matrices]), 0)
  s = jnp.maximum(top, LEAST) ** alpha / jnp.maximum(most, LEAST) ** (1 - alpha)
  return jnp.maximum(s, LEAST)
