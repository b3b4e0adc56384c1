"""The oracle of grouped_matmul: every row times every matrix, and the one of its group kept."""
import jax.numpy as jnp


def grouped_matmul(x, w, sizes):
  """As `api.grouped_matmul`, w dense."""
  E, M = w.shape[0], x.shape[0]
  group = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=M)                        # [M]
  every = jnp.einsum('mi,eio->meo', x, w, preferred_element_type=result(x.dtype, sum_of=True))
  kept = jnp.take_along_axis(every, group[:, None, None], axis=1)[:, 0]
  return kept.astype(result(x.dtype))


def result(dtype, sum_of=False):
  """The dtype of a product of rows of `dtype`, or of the sums before it is rounded."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return jnp.int32
  return jnp.promote_types(dtype, jnp.float32) if sum_of else dtype
