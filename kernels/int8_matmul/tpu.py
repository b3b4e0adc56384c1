"""int8_matmul on a TPU (Pallas, Mosaic): tiles of the product in VMEM, and what follows it there.

A step multiplies a tile of x with one of the values on the int8 units. Without groups the sums are
int32 to the end; with groups each one's int32 sum meets its scale.

Beyond the edge: rows and columns are never written, and along K the codes of x are padded with
zeros, so that whatever is read of the values there counts for nothing.
"""
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.grouped_matmul import tpu as ragged
from lean_jax.kernels.int8_matmul import reference
from lean_jax.kernels.platforms import tuned


def int8_matmul(x, values, scale, x_scale=None, bias=None, *, group=None, activation=None,
                dtype=jnp.float32, blocks=None, interpret=False):
  """See api.int8_matmul.

  Args:
    values: [*E K N], int8 or int4.
    activation: None, or the function itself.
    blocks: the (rows, columns, depth) of a tile; None is `tuned.blocks`'s.
    interpret: as of `pl.pallas_call`.
  """
  *batch, K, N = values.shape
  M, E = x.shape[-2], math.prod(batch)
  bm, bn, bk = tuned.fitted(blocks or tuned.blocks('int8_matmul', values.dtype, M, K, N, group),
                            M, K, N, group)
  steps = -(-K // bk)
  codes, row_scale = reference.quantize_rows(x, x_scale)
  codes = jnp.pad(codes.reshape(E, M, K), [(0, 0), (0, 0), (0, steps * bk - K)])
  wide = tuned.of_tiles(jnp.broadcast_to(scale.astype(jnp.float32), (*scale.shape[:-1], N)),
                        E, steps if group else 1, bk // group if group else 1)
  arrays = [codes, values.reshape(E, K, N), row_scale.reshape(E, M, 1), wide]
  specs = [pl.BlockSpec((None, bm, bk), lambda e, i, j, k: (e, i, k)),
           pl.BlockSpec((None, bk, bn), lambda e, i, j, k: (e, k, j)),
           pl.BlockSpec((None, bm, 1), lambda e, i, j, k: (e, i, 0)),
           pl.BlockSpec((None, None, wide.shape[2], bn),
                        lambda e, i, j, k: (e, k if group else 0, 0, j))]
  if bias is not None:
    arrays.append(jnp.broadcast_to(bias.astype(jnp.float32), (*batch, 1, N)).reshape(E, 1, N))
    specs.append(pl.BlockSpec((None, 1, bn), lambda e, i, j, k: (e, 0, j)))
  body = _whole if steps == 1 else functools.partial(_accumulated, steps)
  scratch = [] if steps == 1 else [pltpu.VMEM((bm, bn), jnp.float32 if group else jnp.int32)]
  y = pl.pallas_call(
      functools.partial(body, group, activation), grid=(E, pl.cdiv(M, bm), pl.cdiv(N, bn), steps),
      in_specs=specs, out_specs=pl.BlockSpec((None, bm, bn), lambda e, i, j, k: (e, i, j)),
      out_shape=jax.ShapeDtypeStruct((E, M, N), dtype), scratch_shapes=scratch,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary'),
          vmem_limit_bytes=tuned.vmem_limit()),
      cost_estimate=pl.CostEstimate(
          flops=2 * E * M * N * K, transcendentals=E * M * N if activation else 0,
          bytes_accessed=E * (M * K + K * N * jnp.iinfo(values.dtype).bits // 8
                              + M * N * jnp.dtype(dtype).itemsize)),
      interpret=interpret, name='int8_matmul')(*arrays)
  return y.reshape(*batch, M, N)


def int8_grouped_matmul(codes, row_scale, values, scale, sizes, *, group=None, dtype=jnp.float32,
                        blocks=None, interpret=False):
  """See api.int8_grouped_matmul.

  Args:
    codes, row_scale: [M K] int8 and [M 1], rows after their rounding.
    values: [E K N], int8 or int4.
    scale: [E G N].
    blocks: the (rows, columns) of a tile; None is `grouped_matmul.tpu.tile`'s.
    interpret: as of `pl.pallas_call`.
  """
  (M, K), (E, _, N) = codes.shape, values.shape
  given = blocks or ragged.tile('int8_matmul', values.dtype, M, K, N, group, E)
  bm, bn, bk = tuned.fitted((*given, K), M, K, N, group)
  codes = jnp.pad(codes, [(0, 0), (0, bk - K)])
  wide = tuned.of_tiles(scale.astype(jnp.float32), E, 1, bk // group if group else 1)[:, 0]

  def part(codes, row_scale, values, scale):
    y = _part(codes, values, scale, group).astype(jnp.float32)
    return (y if group else y * scale[...]) * row_scale[...]
  return ragged.product(part, [codes, row_scale], [values, wide], sizes, (bm, bn, bk), dtype,
                        interpret=interpret)


def _whole(group, activation, x, values, row_scale, scale, *rest):
  """A tile that has all of K."""
  *bias, out = rest
  _finish(_part(x, values, scale, group), row_scale, scale, bias, out, group, activation)


def _accumulated(steps, group, activation, x, values, row_scale, scale, *rest):
  """One of the tiles along K, whose sums are in scratch memory."""
  *bias, out, total = rest
  k = pl.program_id(3)

  @pl.when(k == 0)
  def _():
    total[...] = jnp.zeros_like(total)

  total[...] += _part(x, values, scale, group)

  @pl.when(k == steps - 1)
  def _():
    _finish(total[...], row_scale, scale, bias, out, group, activation)


def _part(x, values, scale, group):
  """The product of two tiles: int32, or with groups float32, their scales in it."""
  if group is None:
    return _dot(x[...], values[...].astype(jnp.int8))
  total = 0.
  for g in range(values.shape[0] // group):
    rows = slice(g * group, (g + 1) * group)
    part = _dot(x[:, rows], values[rows].astype(jnp.int8))
    total += part.astype(jnp.float32) * scale[g:g + 1, :]
  return total


def _finish(total, row_scale, scale, bias, out, group, activation):
  y = total.astype(jnp.float32)
  if group is None:
    y = y * scale[...]
  y = y * row_scale[...]
  if bias:
    y = y + bias[0][...]
  out[...] = (y if activation is None else activation(y)).astype(out.dtype)


def _dot(x, w):
  return lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
