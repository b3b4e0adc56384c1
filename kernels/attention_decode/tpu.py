"""attention_decode for TPUs: codes become floats in VMEM, page by page, under a running softmax.

The grid is rows x pages. A page's codes are where the table says: a cache in one piece is a pool of
pages in order. Pages past a row's tokens are neither read nor computed: their index is that of the
last one before, which Pallas does not fetch again.

Tokens that share a byte are apart in the kernel (`codes.apart`), since a softmax has no order.
Grids are float16, which Mosaic does not have: they come as bits. A token's own grids [S C] are
turned to [C S] before: as they are, C of 128 lanes would be used.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.attention_decode.softmax import Part, more, nothing

PAGE = 512                    # tokens, at most, of a page of a cache in one piece


def part(how, q, k, v, pages, lengths, visible, *, interpret=False):
  """The Part of tokens in codes, in float32.

  Args:
    how: a Scores.
    q: [N R K].
    k, v: Codes; their values [P n*bits/8 K], pages of n tokens, grids [N M*n/g K], [N M*n C].
    pages: [N M], int32, where in values each page of a row is.
    lengths: [N], int32, how many tokens of a row are read at all.
    visible: [B M*n] bool, N a multiple of B.
    interpret: as `pallas_call` has it.
  """
  (N, R, K), (_, rows, _), M = q.shape, k.values.shape, pages.shape[1]
  each = 8 // how.bits
  n, B, C = rows * each, visible.shape[0], v.scale.shape[2]
  bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16)
  by_channel = lambda x: bits(x).reshape(N, M, -1, K)                                # [N M n/g K]
  by_token = lambda x: bits(x).reshape(N, M, rows, each, C).transpose(0, 1, 3, 4, 2)
  seen = visible.astype(jnp.int32).reshape(B, M, rows, each).swapaxes(2, 3)
  seen = seen.reshape(B, M, each, 1, rows)
  last = jnp.maximum(lengths - 1, 0) // n

  def codes(i, j, pages, lengths, last):
    del lengths
    return pages[i, jnp.minimum(j, last[i])], 0, 0

  def own(ndim, batch=N):
    return lambda i, j, pages, lengths, last: (
        lax.rem(i, batch), jnp.minimum(j, last[i]), *(0,) * (ndim - 2))
  row = lambda i, j, *_: (i, 0, 0)
  block = lambda x, batch=N: pl.BlockSpec((1, 1, *x.shape[2:]), own(x.ndim, batch))
  grids = [by_channel(k.scale), by_channel(k.least), by_token(v.scale), by_token(v.least)]
  shape = lambda width: jax.ShapeDtypeStruct((N, R, width), jnp.float32)
  tokens = N * M * n
  call = pl.pallas_call(
      functools.partial(_kernel, how),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=3, grid=(N, M),
          in_specs=[pl.BlockSpec((1, R, K), row), pl.BlockSpec((1, rows, K), codes),
                    pl.BlockSpec((1, rows, K), codes), *map(block, grids), block(seen, B)],
          out_specs=[pl.BlockSpec((1, R, width), row) for width in (K, 1, 1)]),
      out_shape=[shape(K), shape(1), shape(1)],
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      cost_estimate=pl.CostEstimate(
          flops=4 * tokens * R * K, transcendentals=tokens * R,
          bytes_accessed=tokens * (2 * K // each + 4 + 4 * C) + 4 * sum(x.size for x in grids[:2])),
      interpret=interpret, name='attention_decode')
  return Part(*call(pages, lengths, last, q, k.values, v.values, *grids, seen))


def _kernel(how, pages, lengths, last, q, k, v, k_scale, k_least, v_scale, v_least, seen, *out):
  del pages, last
  row, j = pl.program_id(0), pl.program_id(1)
  (_, rows, K), each = k.shape, 8 // how.bits

  @pl.when(j == 0)
  def _():
    for ref, x in zip(out, nothing(q.shape[1:], jnp.float32)):
      ref[0] = x

  @pl.when(j * rows * each < lengths[row])
  def _():
    query, C = q[0], v_scale.shape[3]
    at = j * rows * each + each * lax.broadcasted_iota(jnp.int32, (1, rows), 1)
    scale, least = (_floats(x[0, 0])[:, None] for x in (k_scale, k_least))          # [groups 1 K]
    # Which channels have grid c; its product spreads a token's grids over them.
    grid, channel = (lax.broadcasted_iota(jnp.int32, (C, K), axis) for axis in (0, 1))
    wide = (lax.div(channel, K // C) == grid).astype(jnp.float32)
    spread = lambda x: _product(_floats(x), wide, 0, 0, lax.Precision.HIGHEST)         # [rows K]
    scores, visible = [], []
    for e in range(each):
      keys = _codes(k[0], how.bits, e).reshape(scale.shape[0], -1, K) * scale + least
      scores.append(how.of(_product(query, keys.reshape(rows, K).astype(query.dtype), 1, 1)))
      visible.append((seen[0, 0, e] != 0) & (at + e < lengths[row]))

    def mix(probs):
      total = jnp.zeros(query.shape, jnp.float32)
      for e, p in enumerate(probs):
        values = _codes(v[0], how.bits, e) * spread(v_scale[0, 0, e]) + spread(v_least[0, 0, e])
        total += _product(p.astype(query.dtype), values.astype(query.dtype), 1, 0)
      return total
    found = more(Part(*(ref[0] for ref in out)), scores, visible, mix)
    for ref, x in zip(out, found):
      ref[0] = x


def _codes(packed, bits, e):
  """The codes of the e-th token of each byte, as float32."""
  return ((packed.astype(jnp.int32) >> (e * bits)) & (2 ** bits - 1)).astype(jnp.float32)


def _floats(bits):
  """The float32 of a float16's bits."""
  x = bits.astype(jnp.int32)
  exponent, fraction = (x >> 10) & 31, x & 1023
  normal = lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
  size = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2. ** -24, normal)
  size = jnp.where(exponent == 31, jnp.where(fraction == 0, jnp.inf, jnp.nan), size)
  return jnp.where(x >= 2 ** 15, -size, size)


def _product(a, b, i, j, precision=None):
  return lax.dot_general(a, b, (((i,), (j,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)
