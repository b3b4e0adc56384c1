"""The blocks of GGUF's types as codes, scales and zero points.

A row of a matrix is blocks of 32 numbers, or of 256 of the K types: see ggml's block_q4_0 and the
like. Of a block with a least number m, code * d + m is (code + m / d) * d: its zero point is the
float -m / d. What has d = 0 and is m in all its numbers gets codes of 0 and a d of 1.
"""
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lean_jax.quantization.nested import Nested
from lean_jax.quantization.spec import QuantSpec

FLOATS = dict(F32=np.dtype('<f4'), F16=np.dtype('<f2'), BF16=np.dtype(ml_dtypes.bfloat16))


class Parts(NamedTuple):
  """A matrix in codes: codes [I O], scale [G O] or Nested, zero [G O] or None, its QuantSpec."""
  codes: Any
  scale: Any
  zero: Any
  spec: QuantSpec


def parts(raw, kind):
  """The Parts of a matrix, of the bytes [O, row] of its rows."""
  from_blocks, size, spec = KINDS[kind]
  blocks = raw.reshape(raw.shape[0], -1, size)                                 # [O blocks bytes]
  codes, scale, zero = from_blocks(blocks)
  flat = lambda x: None if x is None else np.ascontiguousarray(x.reshape(x.shape[0], -1).T)
  if isinstance(scale, tuple):
    scale = Nested(flat(scale[0]), flat(scale[1]), None, 'linear')
  else:
    scale = flat(scale)
  return Parts(flat(codes), scale, flat(zero), spec)


def q8_0(b):
  """A scale of two bytes and 32 signed bytes."""
  return b[..., 2:].view(np.int8), half(b[..., :2]), None


def q4_0(b):
  """A scale, and 32 nibbles around 8."""
  return nibbles(b[..., 2:]).astype(np.int8) - np.int8(8), half(b[..., :2]), None


def q4_1(b):
  """A scale, the least number, and 32 nibbles."""
  return (nibbles(b[..., 4:]), *from_least(b))


def q5_0(b):
  """A scale, the fifth bits of 32 codes around 16, and their nibbles."""
  codes = nibbles(b[..., 6:]) | fifth(b[..., 2:6]) << 4
  return codes.astype(np.int8) - np.int8(16), half(b[..., :2]), None


def q5_1(b):
  """A scale, the least number, the fifth bits, and the nibbles."""
  codes = nibbles(b[..., 8:]) | fifth(b[..., 4:8]) << 4
  scale, zero = from_least(b)
  return codes, scale, zero


def mxfp4(b):
  """An exponent, and 32 codes of four bits."""
  return nibbles(b[..., 1:]), b[..., :1], None


def q4_k(b):
  """Scales of scales and of least numbers, both of these in six bits, and 256 nibbles."""
  return k_type(b, pairs(b[..., 16:]))


def q5_k(b):
  """The same with a fifth bit of each code before the nibbles."""
  high = b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1       # [O n 8 32]
  return k_type(b, pairs(b[..., 48:]) | high << 4)


def q6_k(b):
  """Nibbles, two more bits, a signed scale of each 16 codes, and its scale."""
  low = b[..., :128].reshape(*b.shape[:2], 2, 1, 64)
  low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(*b.shape[:2], 2, 4, 32)
  high = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32)
  high = high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
  codes = (low | high << 4).astype(np.int8) - np.int8(32)
  return codes, (b[..., 192:208].view(np.int8), half(b[..., 208:210])), None


def k_type(b, codes):
  """Codes [O n 8 32], (scales, scale of them), zero, of blocks that begin as Q4_K's do."""
  top, low = half(b[..., :2]).astype(np.float32), half(b[..., 2:4]).astype(np.float32)
  first, second, both = np.split(b[..., 4:16], 3, axis=-1)
  scale = np.concatenate([first & 63, both & 15 | first >> 2 & 48], axis=-1)    # [O n 8]
  least = np.concatenate([second & 63, both >> 4 | second >> 2 & 48], axis=-1)
  none = (scale == 0) | (top == 0)
  top = np.where(top == 0, np.float32(1), top)
  scale = np.where(none, np.uint8(1), scale)
  zero = low * least.astype(np.float32) / (top * scale.astype(np.float32))
  return np.where(none[..., None], np.uint8(0), codes), (scale, top), zero


def from_least(b):
  """(scale, zero) of blocks that begin with a scale and a least number."""
  scale, least = (half(b[..., k:k + 2]).astype(np.float32) for k in (0, 2))
  scale = np.where(scale == 0, np.float32(1), scale)
  return scale, -least / scale


def half(b):
  """Bytes as float16."""
  return np.ascontiguousarray(b).view('<f2')


def nibbles(b):
  """Codes of bytes: all lower halves of a block, then all upper ones."""
  return np.concatenate([b & 15, b >> 4], axis=-1)


def pairs(b):
  """Codes [O n 8 32] of bytes [O n 128]: lower halves of each 32 bytes, then their upper ones."""
  b = b.reshape(*b.shape[:2], 4, 1, 32)
  return np.concatenate([b & 15, b >> 4], axis=-2).reshape(*b.shape[:2], 8, 32)


def fifth(b):
  """Bits [O n 32] of bytes [O n 4]."""
  return np.unpackbits(b, axis=-1, bitorder='little')


def _uniform(name):
  """A reader that gives codes of 0 where a block's scale is 0: all of it is its least number."""
  def read(b):
    codes, scale, zero = name(b)
    return np.where(half(b[..., :2]) == 0, np.uint8(0), codes), scale, zero
  return read


KINDS = dict(
    Q8_0=(q8_0, 34, QuantSpec(8, 32)),
    Q4_0=(q4_0, 18, QuantSpec(4, 32)),
    Q4_1=(_uniform(q4_1), 20, QuantSpec(4, 32, symmetric=False)),
    Q5_0=(q5_0, 22, QuantSpec(5, 32)),
    Q5_1=(_uniform(q5_1), 24, QuantSpec(5, 32, symmetric=False)),
    MXFP4=(mxfp4, 17, QuantSpec(4, 32, code='mxfp4')),
    Q4_K=(q4_k, 144, QuantSpec(4, 32, symmetric=False)),
    Q5_K=(q5_k, 176, QuantSpec(5, 32, symmetric=False)),
    Q6_K=(q6_k, 210, QuantSpec(6, 16)),
)
