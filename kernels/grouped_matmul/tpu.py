"""grouped_matmul on a TPU (Pallas, Mosaic); experts in codes are widened in VMEM.

Rows are cut into tiles. A tile is visited once for each expert that has rows in it, in the order of
the rows, so that an expert's weight is read once for all of its tiles, and one without rows never
is (Gale et al. 2022, arXiv:2211.15841, section 5, has this for GPUs). A visit multiplies the whole
tile and keeps the rows of its expert. There are at most as many visits as tiles and experts, less
one; those that are left over read and compute nothing.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.platforms import tuned
from lean_jax.kernels.weight_only_matmul.tpu import scaled_sums, scaled_tile
from lean_jax.quantization import layouts


def grouped_matmul(x, w, sizes, *, blocks=None, interpret=False):
  """See api.grouped_matmul.

  Args:
    x, w: [M K] and [E K N], bfloat16.
    blocks: the (rows, columns) of a tile; None is `tile`'s.
    interpret: as of `pl.pallas_call`.
  """
  (M, K), (E, _, N) = x.shape, w.shape
  bm, bn, _ = tuned.fitted(
      (*(blocks or tile('grouped_matmul', w.dtype, M, K, N, None, E)), K), M, K, N, None)
  part = lambda x, w: lax.dot_general(x[...], w[...], (((1,), (0,)), ((), ())),
                                      preferred_element_type=jnp.float32)
  return product(part, [x], [w], sizes, (bm, bn, K), x.dtype, interpret=interpret)


def grouped_weight_only(x, values, scale, zero, spec, sizes, *, blocks=None, interpret=False):
  """See api.grouped_weight_only.

  Args:
    x: [M K], bfloat16.
    values: [E K N], in layout 'int4'.
    blocks: the (rows, columns) of a tile; None is `tile`'s.
    interpret: as of `pl.pallas_call`.
  """
  (M, K), (E, _, N) = x.shape, values.shape
  given = blocks or tile('weight_only_matmul', values.dtype, M, K, N, spec.group, E)
  bm, bn, bk = tuned.fitted((*given, K), M, K, N, spec.group)
  group = spec.group or bk
  each = bk // group
  x = jnp.pad(x, [(0, 0), (0, bk - K)])
  wide = lambda a: tuned.of_tiles(jnp.broadcast_to(a, (*a.shape[:2], N)), E, 1, each)[:, 0]
  rows, experts = [x], [values, wide(scale if scale.dtype == jnp.bfloat16
                                     else scale.astype(jnp.float32))]
  sums = bm <= group
  if zero is not None:                                     # whole numbers, exact in bfloat16 too
    experts.append(wide(zero.astype(jnp.float32) - layouts.offset(spec)))
  if zero is not None and sums:
    rows.append(jnp.sum(x.reshape(M, each, group), axis=-1, dtype=jnp.float32))
  part = functools.partial(_part, scaled_sums if sums else scaled_tile, group, len(rows))
  return product(part, rows, experts, sizes, (bm, bn, bk), x.dtype, interpret=interpret)


def tile(op, dtype, M, K, N, group, E):
  """(rows, columns) of a tile, for the device that a program is traced for."""
  return tuned.found(op, dtype, M, K, N, group, E) or by_rule(M, E, K)


def by_rule(M, E, K):
  """(rows, columns) of a tile: as many rows as an expert has where they are spread evenly.

  Fewer than 32 take the units as long, more than 256 are computed in vain where experts share them.
  Two tiles of x in 16 bits and of the weight in up to 8 are in VMEM, and a wide one of the weight,
  or two wide ones; a quarter of it is left for the result and for what is spilled.
  """
  rows = min(256, max(32, 1 << max(M // E - 1, 0).bit_length()))
  room = tuned.vmem_limit() * 3 // (16 * K) - rows
  return rows, next((n for n in (1024, 512, 256) if n <= room), 128)


def product(part, rows, experts, sizes, blocks, dtype, *, interpret=False, name='grouped_matmul'):
  """[M N] of rows and the matrices of their experts.

  Args:
    part: a function from the tiles of `rows` and `experts`, as references, to the product
      [bm bn], float32.
    rows: arrays [M ...], the first one those that are multiplied [M bk].
    experts: arrays [E ... N], the first one the matrices [E K N].
    sizes: [E], rows of each expert.
    blocks: (bm, bn, bk), of a tile: as of `tuned.fitted`, with all of K.
    dtype: of the result.
    interpret, name: as of `pl.pallas_call`.
  """
  (M, K), (E, _, N), (bm, bn, bk) = rows[0].shape, experts[0].shape, blocks
  kind = jnp.finfo if jnp.issubdtype(experts[0].dtype, jnp.floating) else jnp.iinfo
  bits = kind(experts[0].dtype).bits
  of_rows = [pl.BlockSpec((bm, a.shape[1]), lambda j, v, expert, tile, *_: (tile[v], 0))
             for a in rows]
  depth = lambda a: bk if a is experts[0] else a.shape[1]
  of_experts = [pl.BlockSpec((None, depth(a), bn), lambda j, v, expert, *_: (expert[v], 0, j))
                for a in experts]
  scalars = visits(sizes, M, bm)
  return pl.pallas_call(
      functools.partial(_kernel, part, bm),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=len(scalars), grid=(pl.cdiv(N, bn), scalars[0].shape[0]),
          in_specs=of_rows + of_experts,
          out_specs=pl.BlockSpec((bm, bn), lambda j, v, expert, tile, *_: (tile[v], j))),
      out_shape=jax.ShapeDtypeStruct((M, N), dtype),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'),
                                           vmem_limit_bytes=tuned.vmem_limit()),
      cost_estimate=pl.CostEstimate(
          flops=2 * M * K * N, transcendentals=0,
          bytes_accessed=min(E, M) * K * N * bits // 8 + M * N * jnp.dtype(dtype).itemsize
          + sum(a.size * a.dtype.itemsize for a in rows)),
      interpret=interpret, name=name)(*scalars, *rows, *experts)


def visits(sizes, M, bm):
  """Which expert and which tile of bm rows each visit is of.

  Returns:
    expert [V], tile [V], int32, those past the last visit as the last one; start [E] and end [E],
    the rows of an expert; count [1], how many visits there are. V depends on shapes alone.
  """
  E, = sizes.shape
  end = jnp.cumsum(sizes.astype(jnp.int32))
  start = end - sizes
  tiles = jnp.where(sizes > 0, (end - 1) // bm - start // bm + 1, 0)           # of each expert
  done = jnp.cumsum(tiles)
  most = -(-M // bm) + min(E, M) - 1
  visit = jnp.minimum(jnp.arange(most), done[-1] - 1)
  expert = jnp.sum(done[None] <= visit[:, None], axis=1, dtype=jnp.int32)
  tile = start[expert] // bm + visit - (done - tiles)[expert]
  return expert, tile.astype(jnp.int32), start.astype(jnp.int32), end, done[-1:]


def _kernel(part, bm, expert, tile, start, end, count, *refs):
  *inputs, out = refs
  v = pl.program_id(1)

  @pl.when(v < count[0])
  def _():
    e, row = expert[v], tile[v] * bm + lax.broadcasted_iota(jnp.int32, (bm, 1), 0)
    mine = (row >= start[e]) & (row < end[e])
    # Of a tile's first visit the others' rows are not written yet; theirs are still to come.
    kept = out[...].astype(jnp.float32)
    out[...] = jnp.where(mine, part(*inputs), kept).astype(out.dtype)


def _part(scaled, group, rows, *tiles):
  """The product of a visit, of the tiles of rows and of experts."""
  x, *sums = tiles[:rows]
  return scaled(group, x, *tiles[rows:], *sums)
