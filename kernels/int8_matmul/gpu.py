"""int8_matmul on NVIDIA Hopper: 8-bit wgmma from shared memory, scales in the epilogue.

A block of the result is one warpgroup's, its sums 32-bit integers in registers. The blocks of both
operands come by TMA, several steps of K ahead of their use. Eight-bit wgmma reads its right side
along K only: hence values [N K], layout 'columns'.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.int8_matmul import reference
from lean_jax.kernels.platforms.hopper import costs, filled, loaded

BLOCK = 128                                # rows, columns and summed elements of a step
_STAGES = 4                                # steps of K in shared memory, 32 KiB each


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

  Whatever does not fill blocks of 128 is padded with zeros first.

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
  lines = [filled(a.astype(jnp.float32), BLOCK)
           for a in (row_scale, scale, *(() if bias is None else (bias,)))]
  y = _blocks(filled(codes, BLOCK, BLOCK), filled(values, BLOCK, BLOCK), *lines,
              activation=activation, dtype=jnp.dtype(dtype))
  return y[:M, :N]


def _blocks(codes, values, row_scale, scale, *bias, activation, dtype):
  """`scaled_product` of whole blocks."""
  (M, K), N = codes.shape, values.shape[0]
  laid_out = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(BLOCK))
  laid_out_sums = (plgpu.TilingTransform((8, 128 // dtype.itemsize)), plgpu.SwizzleTransform(128))

  def kernel(codes, values, row_scale, scale, *refs):
    *bias, y, block = refs
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
    along = lambda ref, at, axis: lax.broadcast_in_dim(
        loaded(ref, at, plgpu.Layout.WGMMA.reduce(1 - axis)), total.shape, (axis,))
    total = total * along(scale, columns, 1) * along(row_scale, rows, 0)
    if bias:
      total = total + along(bias[0], columns, 1)
    block[...] = (total if activation is None else activation(total)).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, y.at[rows, columns])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((M, N), dtype),
      grid=(M // BLOCK, N // BLOCK), grid_names=('m', 'n'),
      scratch_types=[plgpu.SMEM((BLOCK, BLOCK), dtype, transforms=laid_out_sums)],
      **costs(2 * M * N * K, M * K + N * K + M * N * dtype.itemsize, M * N if activation else 0))(
          codes, values, row_scale, scale, *bias)
