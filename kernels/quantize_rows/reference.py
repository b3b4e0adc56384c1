"""The oracle of quantize_rows: normalized, turned, rounded, one after the other."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.quantization.codes import magnitude
from lean_jax.quantization.packing import pack, unpack

HIGH = {8: 127, 4: 7}         # bits -> the greatest code


def quantize_rows(x, scale=None, bits=8):
  """Each row of x on its own symmetric grid, or all on a given one.

  Args:
    x: [... M K], float.
    scale: None, or [...], of each matrix.
    bits: of a code, 8 or 4.

  Returns:
    codes [... M K], int8 in -127..127; of four bits bytes, see `packed`. scale [... M 1], float32.
    A row of zeros has scale 1; a row with a NaN has scale NaN, so that the NaN reaches the product.
  """
  wide = x.astype(jnp.float32)
  given = None if scale is None else scale.reshape(*scale.shape, 1, 1)
  step = step_of(magnitude(wide, -1, keepdims=True), given, bits)
  codes = encoded(wide, step, bits).astype(jnp.int8)
  return codes if bits == 8 else packed(codes), step


def packed(codes):
  """Codes of four bits [... M K], int8, as uint8 [... M ceil(K/2)], the first in the lower bits."""
  return jnp.swapaxes(pack(jnp.swapaxes(codes, -1, -2), 4), -1, -2)


def unpacked(values, K):
  """The inverse of `packed`, int8 [... M K]."""
  codes = jnp.swapaxes(unpack(jnp.swapaxes(values, -1, -2), 4, K), -1, -2)
  return (codes ^ 8).astype(jnp.int8) - jnp.int8(8)


def step_of(top, given=None, bits=8):
  """The step [... M 1] of rows of greatest magnitude `top`; the given one unless that is NaN."""
  if given is None:
    return jnp.where(top == 0, 1, top * np.float32(1 / HIGH[bits]))
  return jnp.where(jnp.isnan(top), top, given.astype(jnp.float32))


def encoded(wide, step, bits=8):
  """The codes of float32 numbers, float32 in -127..127 or -7..7; 0 of a NaN."""
  # A product, as of a range's part: compilers make one of a division where they like.
  codes = jnp.round(wide * (1 / step))
  return jnp.clip(jnp.where(jnp.isnan(codes), 0, codes), -HIGH[bits], HIGH[bits])


def normed(x, scale, epsilon, offset):
  """x / rms(x) * (offset + scale) in x's dtype (Zhang & Sennrich 2019, arXiv:1910.07467)."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
  scale = offset + scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
  return (wide * inverse * scale).astype(x.dtype)


def rotated(x, block):
  """Each `block` consecutive numbers of a row times the Hadamard matrix, float32.

  The matrix is symmetric and its own inverse, so that weights are turned by the same function.
  """
  *batch, K = x.shape
  parts = product(x.reshape(*batch, K // block, block), hadamard(block))
  return parts.reshape(*batch, K)


def product(x, signs):
  """x [... b] @ signs [b b] / sqrt(b), float32; of bfloat16 every product is exact."""
  exact = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
  total = jnp.matmul(x, jnp.asarray(signs, x.dtype), precision=exact,
                     preferred_element_type=jnp.float32)
  return total * np.float32(len(signs) ** -.5)


@functools.lru_cache
def hadamard(size):
  """Sylvester's matrix of signs [size size], size a power of two."""
  one = np.array([[1, 1], [1, -1]], np.float32)
  return functools.reduce(np.kron, [one] * (size.bit_length() - 1), np.ones((1, 1), np.float32))
