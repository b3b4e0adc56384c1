"""Codes as bytes: as many bits as the scheme says, along the axis that a product sums over."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

_DIGITS = 5                   # ternary digits in a byte: 3 ** 5 = 243 of 256
# Jitted below: one program where no other is around it, instead of one for each operation.


def pack(codes, bits):
  """Codes [..., I, O] as bytes [..., ceil(I * bits / 8), O].

  The codes of a column are one stream of bits, the first in the lowest bits of the first byte.
  Codes of 8 bits are stored as they are. Ternary ones (bits 1.6) are 0, 1 or 2, five of them one
  number to the base 3, the first its last digit.
  """
  return codes if bits == 8 else _packed(codes, bits=bits)


@functools.partial(jax.jit, static_argnames='bits', inline=True)
def _packed(codes, bits):
  each, size = unit(bits)
  codes = padded(codes, each).astype(jnp.uint8)
  *batch, I, O = codes.shape
  parts = codes.reshape(*batch, I // each, each, O)
  if bits == 1.6:
    weights = jnp.asarray(3 ** np.arange(_DIGITS), jnp.uint8)
    return jnp.sum(parts * weights.reshape((1,) * (parts.ndim - 2) + (_DIGITS, 1)), axis=-2,
                   dtype=jnp.uint8)
  parts = parts & (2 ** bits - 1)
  out = [sum_of(_shifted(parts[..., k, :], bits * k - 8 * j) for k in range(each)
                if -bits < bits * k - 8 * j < 8) for j in range(size)]
  return jnp.stack(out, axis=-2).reshape(*batch, -1, O)


def unpack(values, bits, rows):
  """The inverse of `pack`: uint8 codes [..., rows, O]; of 8 bits as they are."""
  return values if bits == 8 else _unpacked(values, bits=bits, rows=rows)


@functools.partial(jax.jit, static_argnames=('bits', 'rows'), inline=True)
def _unpacked(values, bits, rows):
  each, size = unit(bits)
  *batch, packed, O = values.shape
  parts = values.reshape(*batch, packed // size, size, O)
  if bits == 1.6:
    one = parts[..., 0, :].astype(jnp.int32)
    codes = [(one // 3 ** k % 3).astype(jnp.uint8) for k in range(each)]
  else:
    codes = [sum_of(_shifted(parts[..., j, :], 8 * j - bits * k) for j in range(size)
                    if -8 < 8 * j - bits * k < bits) & (2 ** bits - 1) for k in range(each)]
  return jnp.stack(codes, axis=-2).reshape(*batch, -1, O)[..., :rows, :]


def unit(bits):
  """(codes, bytes) of the shortest whole number of bytes."""
  if bits == 1.6:
    return _DIGITS, 1
  each = 8 // math.gcd(int(bits), 8)
  return each, each * int(bits) // 8


def padded(x, multiple):
  """x with zeros after its last row, up to a multiple of rows."""
  more = -x.shape[-2] % multiple
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]) if more else x


def sum_of(parts):
  """The sum of arrays that have no bit in common."""
  first, *rest = parts
  for part in rest:
    first = first | part
  return first


def _shifted(x, by):
  """A byte's bits moved up (or down, by < 0); those that leave it are lost."""
  return x << by if by > 0 else x >> -by if by < 0 else x
