"""weight_only_matmul on a TPU (Pallas, Mosaic): codes are widened in VMEM, before the units.

Two forms. Few rows of x (decoding): the codes themselves are multiplied, group by group, and each
group's sums meet its scale and zero point; that is less work than scaling the weight, and a step
takes less time than reading its codes does. Many rows (prefill): the tile of the weight is written
out in bfloat16, once for all the rows, and multiplied at once.

Beyond the edge: rows and columns are never written, and along K x is padded with zeros.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.platforms import tuned
from lean_jax.quantization import layouts


def weight_only_matmul(x, values, scale, zero, spec, *, blocks=None, interpret=False):
  """See api.weight_only_matmul.

  Args:
    x: [*E M K], bfloat16.
    values: [*E K N], in layout 'int4'.
    spec: QuantSpec with groups.
    blocks: the (rows, columns, depth) of a tile; None is `tuned.blocks`'s.
    interpret: as of `pl.pallas_call`.
  """
  *batch, K, N = values.shape
  M, E, group = x.shape[-2], math.prod(batch), spec.group
  tile = blocks or tuned.blocks('weight_only_matmul', values.dtype, M, K, N, group)
  bm, bn, bk = tuned.fitted(tile, M, K, N, group)
  steps, each = -(-K // bk), bk // group
  x = jnp.pad(x.reshape(E, M, K), [(0, 0), (0, 0), (0, steps * bk - K)])
  wide = lambda a: tuned.of_tiles(jnp.broadcast_to(a, (*a.shape[:-1], N)), E, steps, each)
  of_groups = pl.BlockSpec((None, None, each, bn), lambda e, i, j, k: (e, k, 0, j))
  arrays = [x, values.reshape(E, K, N), wide(scale if scale.dtype == jnp.bfloat16
                                             else scale.astype(jnp.float32))]
  specs = [pl.BlockSpec((None, bm, bk), lambda e, i, j, k: (e, i, k)),
           pl.BlockSpec((None, bk, bn), lambda e, i, j, k: (e, k, j)), of_groups]
  decoding = bm <= group
  if zero is not None:                                     # whole numbers, exact in bfloat16 too
    arrays.append(wide(zero.astype(jnp.float32) - layouts.offset(spec)))
    specs.append(of_groups)
  if zero is not None and decoding:
    sums = jnp.sum(x.reshape(E, M, steps, each, group), axis=-1, dtype=jnp.float32)
    arrays.append(jnp.swapaxes(sums, 1, 2))                                   # [E steps M each]
    specs.append(pl.BlockSpec((None, None, bm, each), lambda e, i, j, k: (e, k, i, 0)))
  part = functools.partial(scaled_sums if decoding else scaled_tile, group)
  bits = jnp.iinfo(values.dtype).bits
  y = pl.pallas_call(
      functools.partial(_kernel, part, steps), grid=(E, pl.cdiv(M, bm), pl.cdiv(N, bn), steps),
      in_specs=specs, out_specs=pl.BlockSpec((None, bm, bn), lambda e, i, j, k: (e, i, j)),
      out_shape=jax.ShapeDtypeStruct((E, M, N), x.dtype),
      scratch_shapes=[] if steps == 1 else [pltpu.VMEM((bm, bn), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=tuned.vmem_limit()),
      cost_estimate=pl.CostEstimate(
          flops=2 * E * M * N * K, transcendentals=0,
          bytes_accessed=E * (2 * M * K + K * N * bits // 8 + 2 * M * N)
          + scale.size * scale.dtype.itemsize),
      interpret=interpret, name='weight_only_matmul')(*arrays)
  return y.reshape(*batch, M, N)


def _kernel(part, steps, x, values, scale, *rest):
  if steps == 1:
    *zero, out = rest
    out[...] = part(x, values, scale, *zero).astype(out.dtype)
    return
  *zero, out, total = rest
  k = pl.program_id(3)

  @pl.when(k == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  total[...] += part(x, values, scale, *zero)

  @pl.when(k == steps - 1)
  def _():
    out[...] = total[...].astype(out.dtype)


def scaled_sums(group, x, values, scale, zero=None, sums=None):
  """The product of two tiles, float32: each group's own, with its zero point and scale in it."""
  scale = scale[...].astype(jnp.float32)
  total = 0.
  for g in range(values.shape[0] // group):
    rows = slice(g * group, (g + 1) * group)
    part = _dot(x[:, rows], values[rows].astype(jnp.bfloat16))
    if zero is not None:
      part -= sums[:, g:g + 1] * zero[g:g + 1, :]
    total += part * scale[g:g + 1]
  return total


def scaled_tile(group, x, values, scale, zero=None):
  """The product of two tiles, float32, the second written out in bfloat16."""
  scale, parts = scale[...].astype(jnp.bfloat16), []
  for g in range(values.shape[0] // group):
    part = values[g * group:(g + 1) * group].astype(jnp.bfloat16)
    if zero is not None:
      part = part - zero[g:g + 1, :].astype(jnp.bfloat16)
    parts.append(part * scale[g:g + 1])
  return _dot(x[...], jnp.concatenate(parts))


def _dot(x, w):
  return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
