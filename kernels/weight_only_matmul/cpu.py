"""weight_only_matmul on a CPU: the compiled kernel, which keeps no weight in floats."""
import jax.numpy as jnp
import numpy as np

from lean_jax.kernels.native import library
from lean_jax.quantization import codes as grid

BITS = (2, 4, 8)
# Of bfloat16, that hold an activation's dtype whole.
_PARTS = dict(bfloat16=1, float16=2)


def why_not(x, scale, zero, spec, layout):
  """None, or why it does not take these operands."""
  why = library.why_not_layout(layout)
  if why is not None:
    return why
  if spec.bits not in BITS or spec.code in grid.FLOATS:
    return f'{spec} is not of {", ".join(map(str, BITS))} bits and a table'
  whole = (1 if layout == 'packed' else 4) * 8 // spec.bits
  if spec.group and spec.group < x.shape[-1] and spec.group % whole:
    return f'groups of {spec.group} rows are no multiple of {whole}'
  wanted = jnp.uint8 if spec.code == 'mxfp4' else (jnp.float32, jnp.bfloat16)
  if hasattr(scale, 'dtype') and scale.dtype not in np.atleast_1d(wanted):
    return f'scales are {scale.dtype}'
  if (zero is not None and zero.dtype != jnp.uint8) or x.dtype == jnp.float64:
    return f'zero points or activations are of another dtype ({x.dtype})'
  return library.why_not()


def weight_only_matmul(x, values, scale, zero, spec, level=-1, sizes=None):
  """[*E M N], in x's dtype; operands as of `api.weight_only_matmul`.

  Args:
    level, sizes: as of `int8_matmul.cpu.int8_matmul`.
  """
  scale = scale if hasattr(scale, 'dtype') else scale.astype(jnp.float32)
  none = jnp.zeros(0, jnp.uint8)
  y = library.product(
      'lean_floating', x, values, scale, sizes, level,
      none if zero is None else zero.reshape(-1, *zero.shape[-2:]), table(spec),
      bits=np.int64(spec.bits), group=np.int64(spec.group or x.shape[-1]),
      parts=np.int64(_PARTS.get(x.dtype.name, 3)))
  return y.astype(x.dtype)


def table(spec):
  """[16] float32, what the codes of four bits are, or of two; of eight bits zeros."""
  if spec.bits == 8:
    return jnp.zeros(16)
  codes = (np.arange(16) % 2 ** spec.bits).astype(np.uint8)
  return grid.number(grid.signed(jnp.asarray(codes), spec), spec, jnp.float32)
