"""int8_matmul on a CPU: the compiled kernel, which rounds the activations itself."""
import jax.numpy as jnp
import numpy as np

from lean_jax.kernels.native import library

_MOST = 65_000                # rows of a group, whose sums must fit 32 bits
SCALES = (jnp.float32, jnp.bfloat16)


def why_not(x, values, scale, group, layout):
  """None, or why it does not take these operands."""
  why = library.why_not_layout(layout)
  if why is not None:
    return why
  step = 8 if values.dtype == jnp.uint8 else 4
  if group < x.shape[-1] and group % step:
    return f'groups of {group} rows are no multiple of {step}'
  if group > _MOST:
    return f'groups of {group} rows, more than {_MOST}'
  if scale.dtype not in SCALES or x.dtype == jnp.float64:
    return f'scales are {scale.dtype} and activations {x.dtype}'
  return library.why_not()


def int8_matmul(x, values, scale, group, x_scale=None, level=-1, sizes=None):
  """[*E M N] float32; operands as of `api.int8_matmul`.

  Args:
    group: rows of a group; K if there is one.
    level: index of `library.LEVELS`, the most that is used; -1 is all that there is.
    sizes: None; or [E], and x is [M K], these rows of it each matrix's: y is [M N].
  """
  return library.product(
      'lean_integer', x, values, scale, sizes, level,
      jnp.zeros(0) if x_scale is None else x_scale.reshape(-1).astype(jnp.float32),
      bits=np.int64(4 if values.dtype == jnp.uint8 else 8), group=np.int64(group))
