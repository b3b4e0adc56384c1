"""What layers keep of a text while it is written."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lean_jax.models.kinds import MIXERS
from lean_jax.models.segments import segments, uniform
from lean_jax.nn import attention


class Slot(struct.PyTreeNode):
  """A layer's part of the cache. Stacked arrays are updated in place, never sliced and rejoined."""
  arrays: dict
  index: Any = None

  def get(self, name):
    """This layer's array."""
    x = self.arrays[name]
    return x if self.index is None else jax.lax.dynamic_index_in_dim(x, self.index, 0, False)

  def length(self, name):
    """The length of axis 1 of this layer's array."""
    return self.arrays[name].shape[1 if self.index is None else 2]

  def part(self, name, start, size):
    """This layer's array, [:, start:start + size]."""
    x = self.arrays[name]
    lead = () if self.index is None else (self.index,)
    rest = x.ndim - len(lead) - 2
    at = (*lead, 0, start, *(0,) * rest)
    whole = x.shape[len(lead):]
    out = jax.lax.dynamic_slice(x, at, (1,) * len(lead) + (whole[0], size, *whole[2:]))
    return out.reshape(whole[0], size, *whole[2:])

  def set(self, name, value):
    """With this layer's array replaced."""
    return self._write(name, value, (0,) * value.ndim)

  def put(self, name, new, offset):
    """With `new` [B T ...] at `offset` of this layer's array's axis 1."""
    return self._write(name, new, (0, offset) + (0,) * (new.ndim - 2))

  def _write(self, name, new, at):
    old = self.arrays[name]
    new = new.astype(old.dtype)
    if self.index is not None:
      new, at = new[None], (self.index, *at)
    return self.replace(arrays={**self.arrays,
                                name: jax.lax.dynamic_update_slice(old, new, at)})


def empty_cache(config, batch, length, source=0):
  """Room for `length` tokens, and for the keys and values of `source` tokens of an encoder.

  Returns:
    dict: valid [B S], which places hold a real token; layers, the arrays of each segment; with
    cross attention source [B S], which of the encoder's tokens are real.
  """
  config = config.decoding
  def of(kind):
    shapes = MIXERS[kind[0]].state_shapes(config, batch, length)
    if config.cross:
      shapes |= attention.cross_state_shapes(config, batch, source)
    return shapes

  def made(segment):
    stacked = (segment.count,) if segment.stacked else ()
    each = {str(k): {n: jnp.zeros(stacked + shape, dtype) for n, (shape, dtype) in of(kind).items()}
            for k, kind in enumerate(segment.kinds)}
    return each if len(each) > 1 else each['0']

  cut = segments(config)
  layers = made(cut[0]) if uniform(cut) else {s.name: made(s) for s in cut}
  cache = dict(valid=jnp.zeros((batch, length), bool), layers=layers)
  return cache | dict(source=jnp.zeros((batch, source), bool)) if config.cross else cache
