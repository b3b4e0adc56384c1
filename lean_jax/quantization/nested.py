"""Scales in few bits, with scales of their own."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.quantization.codes import total_of

BLOCK = 256                   # scales that share one of theirs


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=['codes', 'top', 'offset'], meta_fields=['code'])
@dataclasses.dataclass(frozen=True)
class Nested:
  """Scales as codes, times one of their own for each block, plus an offset.

  code 'dynamic': double quantization (QLoRA, arXiv:2305.14314, section 3), in the eight bits of
  Dettmers et al. 2021 (arXiv:2110.02861, section 2.1), as bitsandbytes stores it: blocks of 256
  scales, output channel by output channel. code 'linear': a number times its block's scale, blocks
  of consecutive groups of a channel, as in the K formats of llama.cpp.
  """
  codes: Any                                           # [... G O], uint8
  top: Any                                             # dynamic: [... blocks]; linear: [... G/n O]
  offset: Any                                          # dynamic: [...]; linear: None
  code: str = dataclasses.field(default='dynamic', metadata=dict(static=True))

  @property
  def shape(self):
    """That of the scales."""
    return self.codes.shape

  def astype(self, dtype):
    """The scales, [... G O]."""
    if self.code == 'linear':
      each = self.codes.shape[-2] // self.top.shape[-2]
      top = jnp.repeat(self.top.astype(jnp.float32), each, axis=-2)
      return (self.codes.astype(jnp.float32) * top).astype(dtype)
    *batch, G, O = self.codes.shape
    unit = jnp.asarray(dynamic_numbers())[self.codes]
    block = (jnp.arange(O)[None] * G + jnp.arange(G)[:, None]) // BLOCK                     # [G O]
    top = jnp.take(self.top, block.reshape(-1), axis=-1).reshape(*batch, G, O)
    # One rounding each, not one of both where the processor has such an instruction.
    return (jax.lax.optimization_barrier(unit * top) + self.offset[..., None, None]).astype(dtype)

  def names(self, scale):
    """The logical names of the axes of each array, from those of plain scales."""
    *batch, _, _ = scale
    if self.code == 'linear':
      return dataclasses.replace(self, codes=scale, top=scale, offset=None)
    return dataclasses.replace(self, codes=scale, top=(*batch, None), offset=tuple(batch))


def nested(scale):
  """Scales [... G O], float32, as Nested of code 'dynamic'."""
  *batch, G, O = scale.shape
  flat = jnp.swapaxes(scale, -1, -2).reshape(*batch, O * G)
  offset = total_of(flat, -1) * (1 / flat.shape[-1])
  blocks = -(-O * G // BLOCK)
  flat = jnp.pad(flat - offset[..., None], [(0, 0)] * len(batch) + [(0, blocks * BLOCK - O * G)])
  flat = flat.reshape(*batch, blocks, BLOCK)
  top = jnp.max(jnp.abs(flat), axis=-1)
  numbers = dynamic_numbers()
  middle = jnp.asarray((numbers[1:] + numbers[:-1]) / 2)
  unit = flat / jnp.where(top > 0, top, 1)[..., None]
  codes = jnp.searchsorted(middle, unit).astype(jnp.uint8).reshape(*batch, -1)[..., :O * G]
  return Nested(jnp.swapaxes(codes.reshape(*batch, O, G), -1, -2), top, offset)


@functools.lru_cache
def dynamic_numbers():
  """[256] float32, in order: seven decades of each sign, twice as many numbers in each higher one.

  Dettmers et al. 2021 (arXiv:2110.02861), section 2.1: the middles of equal parts of [.1, 1]. To
  the bit bitsandbytes' own: bounds are float32, counted from the nearer end.
  """
  values = [0., 1.]
  for decade in range(7):
    count = 2 ** decade
    part = float((np.float32(1) - np.float32(.1)) / np.float32(count))
    at = np.arange(count + 1)
    bounds = np.where(at < (count + 1) // 2, float(np.float32(.1)) + part * at,
                      1 - part * (count - at)).astype(np.float32)
    middles = (bounds[:-1] + bounds[1:]) / 2 * np.float32(10. ** (decade - 6))
    values += [*middles, *-middles]
  return np.sort(np.array(values, np.float32))
