"""weight_only_matmul on a CPU: the compiled kernel, which keeps no weight in floats."""
import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.kernels.native import library
from lean_jax.quantization import codes as grid

BITS = (2, 4, 8)
# Of bfloat16, that hold an activation's dtype whole.
_PARTS = dict(bfloat16=1, float16=2)
_FLOATS = ('fp8', 'fp8_e5m2', 'mxfp8')


def why_not(x, scale, zero, spec, layout):
  """None, or why it does not take these operands."""
  why = library.why_not_layout(layout)
  if why is not None:
    return why
  if spec.bits not in BITS or spec.code in _FLOATS:
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


def weight_only_matmul(x, values, scale, zero, spec, level=-1):
  """[*E M N], in x's dtype; operands as of `api.weight_only_matmul`.

  Args:
    level: index of `library.LEVELS`, the most that is used; -1 is all that there is.
  """
  flat = lambda a: a.reshape(-1, *a.shape[len(batch):])
  *batch, M, K = x.shape
  scale = scale if hasattr(scale, 'dtype') else scale.astype(jnp.float32)
  none = jnp.zeros(0, jnp.uint8)
  y = jax.ffi.ffi_call('lean_floating', jax.ShapeDtypeStruct(
      (flat(x).shape[0], M, library.columns(values, batch)), jnp.float32), vmap_method='sequential')(
          flat(x).astype(jnp.float32), flat(values), flat(scale),
          none if zero is None else flat(zero), table(spec), bits=np.int64(spec.bits),
          group=np.int64(spec.group or K),
          parts=np.int64(_PARTS.get(x.dtype.name, 3)), level=np.int64(level))
  return y.reshape(*batch, M, -1).astype(x.dtype)


def table(spec):
  """[16] float32, what the codes of four bits are, or of two; of eight bits zeros."""
  if spec.bits == 8:
    return jnp.zeros(16)
  codes = (np.arange(16) % 2 ** spec.bits).astype(np.uint8)
  return grid.number(grid.signed(jnp.asarray(codes), spec), spec, jnp.float32)
