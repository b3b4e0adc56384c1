"""quantize_rows for TPUs: a block of whole rows is read once, and leaves as bytes.

XLA (compiled for v5e) reads x once for the greatest magnitude and again to round it, and once more
for the norm: 5 bytes a bfloat16 number, 7 with the norm, where here it is 3. A Hadamard product it
writes out in float32. Only what fits in VMEM whole does it read once by itself.

Neighbours that share a byte are in neighbouring lanes, which no instruction adds: the matrix units
do, times a matrix of 1 and 16 for every 256 numbers, exactly.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.quantize_rows import reference
from lean_jax.quantization.codes import magnitude

VMEM = 10 * 2 ** 20           # bytes of a block and its temporaries, of 16 MiB on the smallest chip
SUBLANES = 32                 # rows of a tile of int8
PACKED = 256                  # codes that become a tile of bytes, 128 lanes


def rows(M, K, itemsize):
  """Rows of a block: as many as VMEM holds, at most M; 0 where not even a tile fits."""
  each = K * (2 * itemsize + 2 + 3 * 4)       # x and codes twice, to overlap; three float32 of it
  most = min(VMEM // each, 512) // SUBLANES * SUBLANES
  return min(most, -(-M // SUBLANES) * SUBLANES)


def why_not(x, block):
  """None, or why the kernel does not take x."""
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    return f'takes float32 and bfloat16, and x is {x.dtype}'
  if not rows(32, x.shape[-1], x.dtype.itemsize):
    return f'needs {SUBLANES} rows in {VMEM} bytes, and one has {x.shape[-1]} numbers'
  if block and block % 128:
    return f'turns blocks of multiples of 128 numbers, not of {block}'
  return None


def quantize_rows(x, scale=None, norm=None, *, bits=8, epsilon=None, offset=0., block=None,
                  interpret=False):
  """See api.quantize_rows."""
  *batch, M, K = x.shape
  flat = x.reshape(-1, K)
  R, most = len(flat), rows(len(flat), K, x.dtype.itemsize)
  whole = lambda a: (a, pl.BlockSpec(a.shape, lambda i: (0, 0)))
  row = lambda n: pl.BlockSpec((most, n), lambda i: (i, 0))
  operands = dict(x=(flat, row(K)))
  if norm is not None:
    operands['norm'] = whole(norm.reshape(1, K).astype(jnp.float32))
  if block:
    operands['signs'] = whole(jnp.asarray(reference.hadamard(block), x.dtype))
  if scale is not None:
    each = jnp.broadcast_to(scale.astype(jnp.float32)[..., None], (*batch, M))
    operands['given'] = (each.reshape(R, 1), row(1))
  width, dtype = (K, jnp.int8) if bits == 8 else (-(-K // 2), jnp.uint8)
  if bits == 4:
    operands['pairs'] = whole(jnp.asarray(_pairs(min(K, PACKED)), jnp.bfloat16))
  arrays, specs = zip(*operands.values())
  codes, step = pl.pallas_call(
      functools.partial(_kernel, tuple(operands), bits, epsilon, offset),
      grid=(pl.cdiv(R, most),), in_specs=specs, out_specs=[row(width), row(1)],
      out_shape=[jax.ShapeDtypeStruct((R, width), dtype),
                 jax.ShapeDtypeStruct((R, 1), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      cost_estimate=pl.CostEstimate(
          flops=R * K * (6 + 4 * (norm is not None) + 2 * (block or 0) + PACKED * (bits == 4)),
          transcendentals=R, bytes_accessed=R * (K * x.dtype.itemsize + width + 4)),
      interpret=interpret, name='quantize_rows')(*arrays)
  return codes.reshape(*batch, M, width), step.reshape(*batch, M, 1)


def _kernel(names, bits, epsilon, offset, *refs):
  *given, codes, step = refs
  given = dict(zip(names, given))
  x = given['x'][...]
  if 'norm' in given:
    x = reference.normed(x, given['norm'][0], epsilon, offset)
  wide = (_rotated(x, given['signs'][...]) if 'signs' in given else x).astype(jnp.float32)
  step[...] = reference.step_of(magnitude(wide, -1, keepdims=True),
                                given['given'][...] if 'given' in given else None, bits)
  found = reference.encoded(wide, step[...], bits)
  if bits == 4:
    found = _packed(found, given['pairs'][...])
  codes[...] = found.astype(jnp.int32).astype(codes.dtype)


def _packed(codes, pairs):
  """Float32 codes [R K] as the bytes of `reference.packed`, float32 [R ceil(K/2)]."""
  nibbles = jnp.where(codes < 0, codes + 16, codes).astype(jnp.bfloat16)
  K, parts = codes.shape[1], []
  for k in range(0, K, PACKED):
    part = nibbles[:, k:k + PACKED]
    size = part.shape[1]
    parts.append(jnp.matmul(part, pairs[:size, :-(-size // 2)], preferred_element_type=jnp.float32))
  return jnp.concatenate(parts, axis=1)


def _pairs(size):
  """[size ceil(size/2)]: 1 and 16 where a code is the first and the second of a byte."""
  at = np.arange(size)
  return np.where(at[:, None] // 2 == np.arange(-(-size // 2)), np.where(at % 2, 16, 1)[:, None], 0)


def _rotated(x, signs):
  """As reference.rotated, without a change of shape, which would move every number."""
  b = len(signs)
  return jnp.concatenate([reference.product(x[:, k:k + b], signs)
                          for k in range(0, x.shape[1], b)], axis=1)
