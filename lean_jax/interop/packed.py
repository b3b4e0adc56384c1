"""Checkpoints that store weights in a few bits, with scales, read as the floats they stand for.

mxfp4 (OCP Microscaling Formats 1.0, sections 5.2 and 5.3), of gpt-oss: 32 values of four bits and a
power of two. fp8, of DeepSeek-V3 (arXiv:2412.19437, section 3.3): values of eight bits and a float
for each square of them. Nothing else is rounded: activations are as in any other model.
"""
import dataclasses
import functools

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop.tensors import FLOATS, Tensor, halves, listed, whole

# The values of four bits: a sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0., .5, 1., 1.5, 2., 3., 4., 6.)
_NIBBLES = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
_PAIRS = np.stack([np.tile(_NIBBLES, 16), np.repeat(_NIBBLES, 16)], axis=1)    # of a byte, [256 2]
_BIAS = 127                   # of the exponents of mxfp4's scales
_GROUP = 32                   # values to a scale of mxfp4


@dataclasses.dataclass(frozen=True)
class _Packed:
  """What a Tensor is to its readers, of values and their scales."""
  values: Tensor
  scales: Tensor
  name: str
  shape: tuple[int, ...]

  @property
  def dtype(self):
    """As of a Tensor."""
    return FLOATS[self.kind]

  def read(self):
    """The whole array."""
    out = np.empty(self.shape, self.dtype)
    for box, values in self.blocks():
      out[tuple(slice(*pair) for pair in box)] = values
    return out


class _Mxfp4(_Packed):
  """[E I O] of bytes [E O I/32 16] and exponents [E O I/32]."""
  kind = 'BF16'                 # which has room for all of them

  def blocks(self, box=None):
    """As of a Tensor; parts are of one expert."""
    experts, rows, columns = whole(self.shape) if box is None else box
    for e in range(*experts):
      # Of whole rows of theirs: a group of values has one scale.
      for (a, b), in halves((columns,), max(1, 1 + (1 << 19) // self.shape[1])):
        inside = ((e, e + 1), (a, b))
        codes = self._part(self.values, inside)                                # [1 C I/32 16]
        power = self._part(self.scales, inside).astype(np.int32) - _BIAS       # [1 C I/32]
        wide = np.ldexp(_PAIRS[codes].reshape(*power.shape, _GROUP), power[..., None])
        value = wide.reshape(b - a, self.shape[1]).T[slice(*rows)].astype(self.dtype)
        yield ((e, e + 1), tuple(rows), (a, b)), value[None]

  @staticmethod
  def _part(tensor, inside):
    box = (*inside, *whole(tensor.shape)[2:])
    out = np.empty([b - a for a, b in box], tensor.dtype)
    for part, values in tensor.blocks(box):
      out[tuple(slice(a - s, b - s) for (a, b), (s, _) in zip(part, box))] = values
    return out


@dataclasses.dataclass(frozen=True)
class _Fp8(_Packed):
  """[O I] of bytes and the factors of each square of them."""
  square: tuple[int, int]
  kind = 'F32'

  def blocks(self, box=None):
    """As of a Tensor."""
    for part, values in self.values.blocks(box):
      rows, columns = (np.arange(a, b) // size for (a, b), size in zip(part, self.square))
      yield part, values.astype(np.float32) * self._factors[rows][:, columns]

  @functools.cached_property
  def _factors(self):
    return self.scales.read().astype(np.float32)


def _mxfp4(found, how):
  del how
  out = dict(found)
  for name in [n for n in found if n.endswith('_blocks')]:
    own = name.removesuffix('_blocks')
    values, scales = _both(out, name, f'{own}_scales', ('U8',), ('U8',))
    E, O, groups = scales.shape if len(scales.shape) == 3 else (0, 0, 0)
    if values.shape != (E, O, groups, _GROUP // 2):
      raise InputError(f'{name} is {values.shape} and its scales {scales.shape}, expected [E O G '
                       f'{_GROUP // 2}] and [E O G]; download them again')
    out[own] = _Mxfp4(values, scales, own, (E, _GROUP * groups, O))
  return out


def _fp8(found, how):
  square, out = how.get('weight_block_size'), dict(found)
  if how.get('fmt', 'e4m3') != 'e4m3' or not (
      isinstance(square, list) and len(square) == 2
      and all(type(n) is int and n > 0 for n in square)):
    raise InputError(f'config.json asks for quantization_config = {how}, which lean_jax does not '
                     'read; of fp8 it reads fmt e4m3 with a weight_block_size of two numbers')
  for name in [n for n in found if n.endswith('_scale_inv')]:
    own = name.removesuffix('_scale_inv')
    values, scales = _both(out, own, name, ('F8_E4M3',), tuple(FLOATS))
    if scales.shape != tuple(-(-n // size) for n, size in zip(values.shape, square)):
      raise InputError(f'{own} is {values.shape} and its scales {scales.shape}, expected one for '
                       f'each {square}; download them again')
    out[own] = _Fp8(values, scales, own, values.shape, tuple(square))
  return out


def _both(found, values, scales, *kinds):
  """Takes values and scales out of `found`."""
  lost = [n for n in (values, scales) if n not in found]
  if lost:
    raise InputError(f'the checkpoint lacks {listed(lost)}; download it again')
  tensors = [found.pop(n) for n in (values, scales)]
  for tensor, allowed in zip(tensors, kinds):
    if tensor.kind not in allowed:
      raise InputError(f'{tensor.name} is {tensor.kind}, expected {" or ".join(allowed)}; '
                       'download it again')
  return tensors


# quant_method: the function from {name: Tensor} and quantization_config to Tensors of floats.
READERS = dict(mxfp4=_mxfp4, fp8=_fp8)
