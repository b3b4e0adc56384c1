"""int8_matmul on NVIDIA Hopper: 8-bit wgmma from shared memory, scales in the epilogue.

A block of the result is two warpgroups', its sums 32-bit integers in their registers; a third
brings the blocks of both operands by TMA, several steps of K ahead of their use, and goes on to the
next block while the two write theirs. A core takes blocks in an order in which neighbors share
operands in the cache. Eight-bit wgmma reads its right side along K only: hence values [N K], layout
'columns'.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.int8_matmul import reference
from lean_jax.kernels.platforms.hopper import CORES, costs, filled, loaded

ROWS, COLUMNS, DEPTH = 256, 128, 128       # of a block, and of a step of it
LEAST = 64                                 # blocks that keep half of the device's cores at work
_HALF = ROWS // 2                          # rows of a block that are one warpgroup's
_STAGES = 4                                # steps of K in shared memory, 48 KiB each
_PART = 64                                 # rows of the result that are written at a time


def blocks(M, N):
  """How many blocks a result has."""
  return -(-M // ROWS) * -(-N // COLUMNS)


def int8_matmul(x, values, scale, x_scale=None, bias=None, *, activation=None, dtype=jnp.float32):
  """See api.int8_matmul.

  Args:
    values: [*E N K], int8.
    scale: [*E 1 N] or [*E 1 1].
    activation: None, or the function itself.
  """
  *batch, N, _ = values.shape
  codes, row_scale = reference.quantize_rows(x, x_scale)
  columns = lambda a: jnp.broadcast_to(a.astype(jnp.float32), (*batch, 1, N))[..., 0, :]
  product = functools.partial(scaled_product, activation=activation, dtype=dtype)
  for _ in batch:
    product = jax.vmap(product)
  row_scale = jnp.broadcast_to(row_scale, (*x.shape[:-1], 1))[..., 0]
  return product(codes, values, row_scale, columns(scale),
                 *(() if bias is None else (columns(bias),)))


def scaled_product(codes, values, row_scale, scale, bias=None, *, activation=None,
                   dtype=jnp.float32):
  """(codes @ values.T) * scale * row_scale, sums exact; then the bias and the activation.

  Whatever does not fill blocks is padded with zeros first.

  Args:
    codes: [M K], int8.
    values: [N K], int8.
    row_scale: [M], float32.
    scale, bias: [N], float32; or bias None.
    activation: None, or a function of float32.
    dtype: of the result.

  Returns:
    [M N].

  Raises:
    ValueError: shapes or dtypes do not fit.
  """
  (M, K), N = codes.shape, values.shape[0]
  if codes.dtype != jnp.int8 or values.dtype != jnp.int8 or values.shape != (N, K):
    raise ValueError(f'codes {codes.dtype} {codes.shape} and values {values.dtype} {values.shape}; '
                     f'expected int8 [M K] and int8 [N K]')
  if row_scale.shape != (M,) or scale.shape != (N,):
    raise ValueError(f'scales {row_scale.shape} and {scale.shape}; expected {(M,)} and {(N,)}')
  of_column = lambda a: filled(a.astype(jnp.float32), COLUMNS)
  y = _blocks(filled(codes, ROWS, DEPTH), filled(values, COLUMNS, DEPTH),
              filled(row_scale.astype(jnp.float32), ROWS), of_column(scale),
              *(() if bias is None else (of_column(bias),)),
              activation=activation, dtype=jnp.dtype(dtype))
  return y[:M, :N]


def _blocks(codes, values, row_scale, scale, *bias, activation, dtype):
  """`scaled_product` of whole blocks."""
  (M, K), N = codes.shape, values.shape[0]
  steps, down, across = K // DEPTH, M // ROWS, N // COLUMNS
  width = 128 // dtype.itemsize            # columns of the result that are written at a time
  laid_out = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(128))

  def pipeline(body, context):
    spec = lambda rows: plgpu.BlockSpec((rows, DEPTH), lambda k: (0, k), transforms=laid_out)
    return plgpu.emit_pipeline_warp_specialized(
        body, grid=(steps,), memory_registers=40, in_specs=[spec(ROWS), spec(COLUMNS)],
        wg_axis='group', num_compute_wgs=2, max_concurrent_steps=min(_STAGES, steps),
        compute_context=context)

  def kernel(codes, values, row_scale, scale, *refs):
    *bias, y, parts = refs
    group = lax.axis_index('group')

    def each_block(allocated):
      @plgpu.nd_loop((down * across,), collective_axes='core')
      def _(loop):
        m, n = plgpu.planar_snake(loop.index[0], (down, across), 0, 8)
        half = pl.ds(group * _HALF, _HALF)

        def step(_, x, w, sums):
          plgpu.wgmma(sums, x.at[half], w.T)
          # Then only may the step be overwritten; the other warpgroup multiplies meanwhile.
          plgpu.wgmma_wait(0)
          return sums

        def compute(summed):
          def product(sums):
            summed(sums)
            return sums[...]
          total = pl.run_scoped(product, plgpu.ACC((_HALF, COLUMNS), jnp.int32))
          _write(total, m * ROWS + group * _HALF, n * COLUMNS)
        pipeline(step, compute)(codes.at[pl.ds(m * ROWS, ROWS)],
                                values.at[pl.ds(n * COLUMNS, COLUMNS)], allocations=allocated)

    def _write(total, row, column):
      for k, (i, j) in enumerate((i, j) for i in range(0, _HALF, _PART)
                                 for j in range(0, COLUMNS, width)):
        rows, columns = pl.ds(row + i, _PART), pl.ds(column + j, width)
        part = total[i:i + _PART, j:j + width].astype(jnp.float32)
        along = lambda ref, at, axis, part=part: lax.broadcast_in_dim(
            loaded(ref, at, plgpu.Layout.WGMMA.reduce(1 - axis)), part.shape, (axis,))
        part = part * along(scale, columns, 1) * along(row_scale, rows, 0)
        if bias:
          part = part + along(bias[0], columns, 1)
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)      # the part before the last has left
        parts[group, k % 2] = (part if activation is None else activation(part)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(parts.at[group, k % 2], y.at[rows, columns])

    ignored = lambda *_: None
    pl.run_scoped(each_block, pipeline(ignored, ignored).get_allocations(codes, values),
                  collective_axes='group')
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((M, N), dtype),
      grid=(min(CORES, down * across),), grid_names=('core',), num_threads=3, thread_name='group',
      scratch_types=[plgpu.SMEM((2, 2, _PART, width), dtype, transforms=(
          plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128)))],
      **costs(2 * M * N * K, M * K + N * K + M * N * dtype.itemsize, M * N if activation else 0))(
          codes, values, row_scale, scale, *bias)
