"""The oracle of int8_matmul: 32-bit integer arithmetic written out."""
import jax.numpy as jnp

from lean_jax.kernels.quantize_rows.reference import quantize_rows


def int8_matmul(x, values, scale, x_scale=None, group=None):
  """See api.int8_matmul."""
  codes, row_scale = quantize_rows(x, x_scale)
  K = values.shape[-2]
  group = group or K
  total = 0.
  for k, start in enumerate(range(0, K, group)):
    part = jnp.matmul(codes[..., start:start + group].astype(jnp.int32),
                      values[..., start:start + group, :].astype(jnp.int32))
    total = total + part.astype(jnp.float32) * scale[..., k, :][..., None, :].astype(jnp.float32)
  return total * row_scale
