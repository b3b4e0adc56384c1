"""The oracle of int8_matmul: plain jnp, the integers exact."""
import jax.numpy as jnp


def quantize_rows(x):
  """Each row of x on its own symmetric 8-bit grid.

  Args:
    x: [... M K], float.

  Returns:
    codes [... M K], int8 in -127..127; scale [... M 1], float32. A row of zeros has scale 1;
    a row with a NaN has scale NaN, so that the NaN reaches the product.
  """
  top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
  scale = jnp.where(top == 0, 1, top / 127)
  codes = jnp.round(x.astype(jnp.float32) / scale)
  return jnp.clip(jnp.nan_to_num(codes), -127, 127).astype(jnp.int8), scale


def int8_matmul(x, values, scale):
  """As `api.int8_matmul`, the integers multiplied in int32."""
  codes, row_scale = quantize_rows(x)
  total = jnp.matmul(codes.astype(jnp.int32), values.astype(jnp.int32))
  return total.astype(jnp.float32) * row_scale * scale
