"""The oracle of int8_matmul: 32-bit integer arithmetic written out."""
import jax.numpy as jnp
import numpy as np

_PART = np.float32(1 / 127)


def quantize_rows(x, scale=None):
  """Each row of x on its own symmetric 8-bit grid, or all on a given one.

  Args:
    x: [... M K], float.
    scale: None, or [...], of each matrix.

  Returns:
    codes [... M K], int8 in -127..127; scale [... M 1], float32. A row of zeros has scale 1;
    a row with a NaN has scale NaN, so that the NaN reaches the product.
  """
  wide = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
  if scale is None:
    step = jnp.where(top == 0, 1, top * _PART)
  else:
    given = scale.astype(jnp.float32).reshape(*scale.shape, 1, 1)
    step = jnp.where(jnp.isnan(top), top, given)
  # Products, since compilers make these of divisions where they like.
  codes = jnp.round(wide * (1 / step))
  return jnp.clip(jnp.nan_to_num(codes), -127, 127).astype(jnp.int8), step


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
