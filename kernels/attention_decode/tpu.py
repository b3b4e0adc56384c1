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
  rows, each = k.shape[1], 8 // how.bits

  @pl.when(j == 0)
  def _():
    for ref, x in zip(out, nothing(q.shape[1:], jnp.float32)):
      ref[0] = x

  @pl.when(j * rows * each < lengths[row])
  def _():
    at = j * rows * each + each * lax.broadcasted_iota(jnp.int32, (1, rows), 1)
    grids = [_floats(x[0, 0]) for x in (k_scale, k_least)]                          # [groups K]
    query = q[0]
    scores, visible = [], []
    for e in range(each):
      codes = _codes(k[0], how.bits, e, query.dtype)
      scores.append(how.of(_scores(query, codes, *grids)))
      visible.append((seen[0, 0, e] != 0) & (at + e < lengths[row]))

    def mix(probs):
      return sum(_mixed(p, _codes(v[0], how.bits, e, query.dtype), _floats(v_scale[0, 0, e]),
                        _floats(v_least[0, 0, e])) for e, p in enumerate(probs))
    found = more(Part(*(ref[0] for ref in out)), scores, visible, mix)
    for ref, x in zip(out, found):
      ref[0] = x


def _scores(q, codes, scale, least):
  """Products of q [R K] with keys of codes [S K] and grids [groups K], each of S/groups tokens.

  q (code scale + least) is (q scale) code + q least: a query for each group meets the codes as they
  are, and a token takes the product of its own.
  """
  R, (groups, _), S = q.shape[0], scale.shape, codes.shape[0]
  q = q.astype(jnp.float32)
  each = jnp.concatenate([q * scale[g:g + 1] for g in range(groups)])            # [groups*R K]
  products = _product(each.astype(codes.dtype), codes, 1, 1)                      # [groups*R S]
  begins = _product(q, least, 1, 1)                                              # [R groups]
  token = lax.broadcasted_iota(jnp.int32, (1, S), 1)
  return sum(jnp.where(_inside(token, g, S // groups), products[g * R:(g + 1) * R]
                       + begins[:, g:g + 1], 0) for g in range(groups))


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
  """The codes of the e-th token of each byte; bfloat16 holds those of 8 bits."""
  codes = (packed.astype(jnp.int32) >> (e * bits)) & (2 ** bits - 1)
  return codes.astype(jnp.float32).astype(dtype)


def _floats(bits):
  """The float32 of a float16's bits."""
  x = bits.astype(jnp.int32)
  exponent, fraction = (x >> 10) & 31, x & 1023
  normal = lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
  size = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2. ** -24, normal)
  size = jnp.where(exponent == 31, jnp.where(fraction == 0, jnp.inf, jnp.nan), size)
  return jnp.where(x >= 2 ** 15, -size, size)


def _product(a, b, i, j):
  """A product over these axes in float32, of float32 without rounding them to bfloat16 first."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((i,), (j,)), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)
