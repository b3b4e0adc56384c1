"""int8_matmul on NVIDIA Hopper: 8-bit wgmma from shared memory, scales in the epilogue.

A block of the result is one warpgroup's, its sums 32-bit integers in registers. The blocks of both
operands come by TMA, several steps of K ahead of their use. Eight-bit wgmma reads its right side
along K only: hence values [N K], layout 'columns'.
"""
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.platforms.hopper import filled, loaded

BLOCK = 128                                # rows, columns and summed elements of a step
_STAGES = 4                                # steps of K in shared memory, 32 KiB each


def scaled_product(codes, values, row_scale, scale):
  """(codes @ values.T) * row_scale * scale, sums exact.

  Whatever does not fill blocks of 128 is padded with zeros first.

  Args:
    codes: [M K], int8.
    values: [N K], int8.
    row_scale: [M], float32.
    scale: [N], float32.

  Returns:
    [M N], float32.

  Raises:
    ValueError: shapes or dtypes do not fit.
  """
  (M, K), N = codes.shape, values.shape[0]
  if codes.dtype != jnp.int8 or values.dtype != jnp.int8 or values.shape != (N, K):
    raise ValueError(f'codes {codes.dtype} {codes.shape} and values {values.dtype} {values.shape}; '
                     f'expected int8 [M K] and int8 [N K]')
  if row_scale.shape != (M,) or scale.shape != (N,):
    raise ValueError(f'scales {row_scale.shape} and {scale.shape}; expected {(M,)} and {(N,)}')
  y = _blocks(filled(codes, BLOCK, BLOCK), filled(values, BLOCK, BLOCK),
              filled(row_scale.astype(jnp.float32), BLOCK),
              filled(scale.astype(jnp.float32), BLOCK))
  return y[:M, :N]


def _blocks(codes, values, row_scale, scale):
  """`scaled_product` of whole blocks."""
  (M, K), N = codes.shape, values.shape[0]
  laid_out = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK))
  laid_out_sums = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

  def kernel(codes, values, row_scale, scale, y, block):
    m, n = lax.axis_index('m'), lax.axis_index('n')
    rows, columns = pl.ds(m * BLOCK, BLOCK), pl.ds(n * BLOCK, BLOCK)

    def summed(sums):
      def step(_, x, w):
        plgpu.wgmma(sums, x, w.T)
        plgpu.wgmma_wait(1)                # the step before is done: its blocks may be overwritten
      steps = K // BLOCK
      read = lambda at: plgpu.BlockSpec((BLOCK, BLOCK), lambda k: (at, k), transforms=laid_out,
                                        delay_release=min(1, steps - 1))
      plgpu.emit_pipeline(step, grid=(steps,), in_specs=[read(m), read(n)],
                          max_concurrent_steps=min(_STAGES, steps))(codes, values)
      return sums[...]
    total = pl.run_scoped(summed, plgpu.ACC((BLOCK, BLOCK), jnp.int32)).astype(jnp.float32)
    of_row = loaded(row_scale, rows, plgpu.Layout.WGMMA.reduce(1))
    of_column = loaded(scale, columns, plgpu.Layout.WGMMA.reduce(0))
    block[...] = (total * lax.broadcast_in_dim(of_row, total.shape, (0,))
                  * lax.broadcast_in_dim(of_column, total.shape, (1,)))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, y.at[rows, columns])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((M, N), jnp.float32),
      grid=(M // BLOCK, N // BLOCK), grid_names=('m', 'n'),
      scratch_types=[plgpu.SMEM((BLOCK, BLOCK), jnp.float32, transforms=laid_out_sums)],
      )(codes, values, row_scale, scale)
