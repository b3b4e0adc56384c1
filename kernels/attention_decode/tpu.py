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

PAGE = 2048                   # tokens, at most, of a page of a cache in one piece
LANES, SUBLANES = 128, 8      # of a register
_HIGH, _NIBBLES = 0x80808080 - 2 ** 32, 0x0f0f0f0f         # of each of four bytes


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
  (N, heads, K), (_, rows, _), M = q.shape, k.values.shape, pages.shape[1]
  each = 8 // how.bits
  n, B, C = rows * each, visible.shape[0], v.scale.shape[2]
  R = -(-heads // SUBLANES) * SUBLANES                     # parts of registers would be moved about
  q = jnp.pad(q, ((0, 0), (0, R - heads), (0, 0)))
  bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16)
  by_channel = lambda x: bits(x).reshape(N, M, -1, K)                                # [N M n/g K]
  by_token = lambda x: bits(x).reshape(N, M, rows, each, C).transpose(0, 1, 3, 4, 2)
  both = lambda of, x, axis: jnp.concatenate([of(x.scale), of(x.least)], axis=axis)
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
  grids = [both(by_channel, k, 2), both(by_token, v, 3)]
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
          bytes_accessed=tokens * (2 * K // each + 4 + 4 * C) + 2 * grids[0].size),
      interpret=interpret, name='attention_decode')
  found = call(pages, lengths, last, q, k.values, v.values, *grids, seen)
  return Part(*(x[:, :heads] for x in found))


def _kernel(how, pages, lengths, last, q, k, v, k_grids, v_grids, seen, *out):
  del pages, last
  row, j = pl.program_id(0), pl.program_id(1)
  rows, each = k.shape[1], 8 // how.bits

  @pl.when(j == 0)
  def _():
    for ref, x in zip(out, nothing(q.shape[1:], jnp.float32)):
      ref[0] = x

  @pl.when(j * rows * each < lengths[row])
  def _():
    at = j * rows * each + each * lax.broadcasted_iota(jnp.int32, (1, rows), 1)
    grids = _grids(k_grids[0, 0], how.bits)                                          # [groups K]
    query = q[0]
    scores, visible = [], []
    for e in range(each):
      codes = _codes(k[0], how.bits, e, query.dtype)
      scores.append(how.of(_scores(query, codes, *grids)))
      visible.append((seen[0, 0, e] != 0) & (at + e < lengths[row]))

    def mix(probs):
      return sum(_mixed(p, _codes(v[0], how.bits, e, query.dtype),
                        *_grids(v_grids[0, 0, e], how.bits)) for e, p in enumerate(probs))
    found = more(Part(*(ref[0] for ref in out)), scores, visible, mix)
    for ref, x in zip(out, found):
      ref[0] = x


def _scores(q, codes, scale, least):
  """Products of q [R K] with keys of codes [S K] and grids [groups K], each of S/groups tokens.

  q (code scale + least) is (q scale) code + q least: a query for each group meets the codes as they
  are, and a token takes the product of its own. That is done for a register's lanes of tokens at a
  time: fewer of the products are of other groups.
  """
  R, (groups, _), S = q.shape[0], scale.shape, codes.shape[0]
  q, size = q.astype(jnp.float32), S // groups
  few = max(1, LANES // size)
  few = few if groups % few == 0 else groups
  begins = _product(q, least, 1, 1)                                              # [R groups]
  token = lax.broadcasted_iota(jnp.int32, (1, few * size), 1)
  out = []
  for first in range(0, groups, few):
    own = range(first, first + few)
    each = jnp.concatenate([q * scale[g:g + 1] for g in own])                    # [few*R K]
    part = codes[first * size:(first + few) * size]
    products = _product(each.astype(codes.dtype), part, 1, 1)                    # [few*R few*size]
    out.append(sum(jnp.where(_inside(token, k, size), products[k * R:(k + 1) * R]
                             + begins[:, g:g + 1], 0) for k, g in enumerate(own)))
  return jnp.concatenate(out, axis=1)


def _mixed(p, codes, scale, least):
  """p [R S] times values of codes [S K] and grids [C S], each of K/C channels; as `_scores`."""
  R, (C, _), K = p.shape[0], scale.shape, codes.shape[1]
  each = jnp.concatenate([p * scale[c:c + 1] for c in range(C)])                  # [C*R S]
  products = _product(each.astype(codes.dtype), codes, 1, 0)                      # [C*R K]
  channel = lax.broadcasted_iota(jnp.int32, (1, K), 1)
  return sum(jnp.where(_inside(channel, c, K // C), products[c * R:(c + 1) * R] + jnp.sum(
      p * least[c:c + 1], axis=-1, keepdims=True), 0) for c in range(C))


def _inside(at, part, size):
  return (at >= part * size) & (at < (part + 1) * size)


def _codes(packed, bits, e, dtype):
  """The codes of the e-th token of each byte, those of 8 bits less 128; bfloat16 holds them."""
  words = pltpu.bitcast(packed, jnp.int32)                 # four bytes at a time
  words = words ^ _HIGH if bits == 8 else (words >> (e * bits)) & _NIBBLES
  return pltpu.bitcast(words, jnp.int8).astype(jnp.int32).astype(jnp.float32).astype(dtype)


def _grids(both, bits):
  """The scales and the least numbers of codes as `_codes` gives them, of both in float16's bits."""
  scale, least = jnp.split(_floats(both), 2)
  return scale, least + 128 * scale if bits == 8 else least


def _floats(bits):
  """The float32 of a float16's bits."""
  x = bits.astype(jnp.int32)
  size = x & 0x7fff
  placed = size << 13                                      # a float32, its exponent 112 too small
  of = lambda x: lax.bitcast_convert_type(x, jnp.float32)
  found = jnp.where(size < 1 << 10, size.astype(jnp.float32) * 2. ** -24, of(placed) * 2. ** 112)
  found = jnp.where(size >= 31 << 10, of(placed | 0x7f800000), found)     # infinite, or a NaN
  return jnp.where(x >= 1 << 15, -found, found)


def _product(a, b, i, j):
  """A product over these axes in float32, of float32 without rounding them to bfloat16 first."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((i,), (j,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)
