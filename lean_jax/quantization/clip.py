"""Ranges that leave a group's largest values out, where that makes the error smaller."""
import jax.numpy as jnp
import numpy as np

from lean_jax.errors import InputError
from lean_jax.quantization import codes as grid
from lean_jax.quantization.error import least

PARTS = np.linspace(1., .4, 25, dtype=np.float32)       # of the range, that are tried
CLIPS = ('absmax', 'mse')


def check_clip(clip):
  """Raises InputError for what is not in `CLIPS`."""
  if clip not in CLIPS:
    raise InputError(f'clip {clip!r}; give one of {", ".join(CLIPS)}')


def least_error(x, spec, rows, second=None):
  """The part of each group's range that gives the least squared error.

  Args:
    x: [..., G, g, O], float32, groups as `formats.grouped` makes them.
    spec: QuantSpec.
    rows: how many rows there are in all groups.
    second: None, or [..., G, g, g], the sum of the inputs' x x^T within each group: the error is
      then that of the group's products, as in AWQ (arXiv:2306.00978, section 4).

  Returns:
    [..., G, O], to be `shrink` of `formats.quantize`; the same for all if the scheme has one scale
    a matrix.
  """
  def error(part):
    scale, zero = grid.fit(x, spec, rows, part)
    up = lambda v: None if v is None else v[..., None, :]
    value = grid.decode(grid.encode(x, up(scale), up(zero), spec), up(scale), up(zero), spec,
                        jnp.float32)
    off = value - x
    each = jnp.sum(off * (off if second is None else second @ off), axis=-2)         # [..., G, O]
    return jnp.broadcast_to(jnp.sum(each, axis=(-2, -1), keepdims=True), each.shape) if (
        spec.tensor) else each

  part = least(error, PARTS, jnp.ones_like(x[..., 0, :]))
  return part[..., :1, :1] if spec.tensor else part
