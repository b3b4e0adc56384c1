"""Streams of bits: codes as bytes and back, the first code in the lowest bits of the first byte."""
import numpy as np


def packed(codes, bits, unit=1):
  """Rows of codes, uint8 [R C], as bytes [R N]; zeros fill the last `unit` bytes."""
  if 8 % bits:
    ones = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder='little')
    out = np.packbits(ones.reshape(len(codes), -1), axis=-1, bitorder='little')
  else:
    each = 8 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    out = codes[:, ::each].copy()
    for k in range(1, each):
      out |= codes[:, k::each] << np.uint8(bits * k)
  return np.pad(out, ((0, 0), (0, -out.shape[1] % unit)))


def unpacked(raw, bits, count):
  """The inverse of `packed`: uint8 codes [R count]."""
  if 8 % bits:
    ones = np.unpackbits(raw, axis=-1, count=count * bits, bitorder='little')
    ones = ones.reshape(len(raw), count, bits)
    return np.packbits(ones, axis=-1, bitorder='little')[..., 0]
  shifts = np.arange(0, 8, bits, dtype=np.uint8)
  return (raw[..., None] >> shifts & (2 ** bits - 1)).reshape(len(raw), -1)[:, :count]


def words(codes, bits):
  """Rows of codes, uint8 [R C], as int32 [R ceil(C bits / 32)]."""
  return np.ascontiguousarray(packed(codes, bits, 4)).view('<i4')


def from_words(array, bits, count):
  """The inverse of `words`."""
  return unpacked(np.ascontiguousarray(array, '<i4').view(np.uint8), bits, count)
