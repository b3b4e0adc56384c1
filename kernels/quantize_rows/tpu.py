"""quantize_rows for TPUs: a block of whole rows is read once, and leaves as bytes.

XLA (compiled for v5e) reads x once for the greatest magnitude and again to round it, and once more
for the norm: 5 bytes a bfloat16 number, 7 with the norm, where here it is 3. A Hadamard product it
writes out in float32. Only what fits in VMEM whole does it read once by itself.
"""
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.quantize_rows import reference

VMEM = 10 * 2 ** 20           # bytes of a block and its temporaries, of 16 MiB on the smallest chip
SUBLANES = 32                 # rows of a tile of int8


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


def quantize_rows(x, scale=None, norm=None, *, epsilon=None, offset=0., block=None,
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
  arrays, specs = zip(*operands.values())
  codes, step = pl.pallas_call(
      functools.partial(_kernel, tuple(operands), epsilon, offset),
      grid=(pl.cdiv(R, most),), in_specs=specs, out_specs=[row(K), row(1)],
      out_shape=[jax.ShapeDtypeStruct((R, K), jnp.int8),
                 jax.ShapeDtypeStruct((R, 1), jnp.float32)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
      cost_estimate=pl.CostEstimate(
          flops=R * K * (6 + 4 * (norm is not None) + 2 * (block or 0)), transcendentals=R,
          bytes_accessed=R * (K * (x.dtype.itemsize + 1) + 4)),
      interpret=interpret, name='quantize_rows')(*arrays)
  return codes.reshape(x.shape), step.reshape(*batch, M, 1)


def _kernel(names, epsilon, offset, *refs):
  *given, codes, step = refs
  given = dict(zip(names, given))
  x = given['x'][...]
  if 'norm' in given:
    x = reference.normed(x, given['norm'][0], epsilon, offset)
  wide = (_rotated(x, given['signs'][...]) if 'signs' in given else x).astype(jnp.float32)
  nan = jnp.max(jnp.isnan(wide).astype(jnp.float32), axis=-1, keepdims=True)
  top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)     # which may lose a NaN on its way
  top = jnp.where(nan > 0, jnp.nan, top)
  step[...] = reference.step_of(top, given['given'][...] if 'given' in given else None)
  codes[...] = reference.encoded(wide, step[...]).astype(jnp.int32).astype(jnp.int8)


def _rotated(x, signs):
  """As reference.rotated, without a change of shape, which would move every number."""
  b = len(signs)
  return jnp.concatenate([reference.product(x[:, k:k + b], signs)
                          for k in range(0, x.shape[1], b)], axis=1)
