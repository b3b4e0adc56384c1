"""weight_only_matmul: activations as they are, times a weight in codes of few bits."""
import functools

import jax
import jax.numpy as jnp

from lean_jax.kernels.platforms import device, operands
from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.kernels.weight_only_matmul import cpu, reference
from lean_jax.quantization import layouts


def weight_only_matmul(x, values, scale, zero, spec, *, layout='packed', implementation=None):
  """x @ w, w being what the codes stand for.

  Gradients reach x, and scale where it is an array of floats.

  Args:
    x: [*E M K], float.
    values: the codes in `layout`: 'packed', [*E ceil(K * bits / 8) N], uint8, as
      `quantization.packing.pack` does, int8 or uint8 codes if they have 8 bits; 'int4', [*E K N],
      jnp.int2, int4 or int8; 'columns', [*E N ceil(K * bits / 8)]; 'panels', [*E N/64 rows/4
      256]. See `quantization.layouts`.
    scale: [*E G N] or [*E G 1], groups of rows as spec says; or quantization.nested.Nested.
    zero: as scale, or None where spec is symmetric.
    spec: QuantSpec.
    layout: one of `quantization.layouts.LAYOUTS`.
    implementation: None is the fastest that the platform has for these operands; 'native' is a
      kernel on CPUs, 'pallas' one on TPUs and NVIDIA Hoppers; 'xla' writes the weight out in x's
      dtype; 'reference' in float32.

  Returns:
    [*E M N], in x's dtype; sums in float32.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation or layout that is not there or
      does not run here.
  """
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x is {x.dtype} {x.shape}; expected floats [*E M K]')
  check(x.shape[:-2], x.shape[-1], values, scale, zero, spec, layout)
  return _product(implementation, spec, layout, x, values, scale, zero)


def check(batch, K, values, scale, zero, spec, layout):
  """Raises ValueError where these are not the parts of matrices [*batch K N]."""
  layouts.check(layout, spec)
  N = layouts.columns_of(values.shape, layout)
  expected = layouts.shape(batch, K, N, spec, layout)
  if values.shape != expected:
    letters = dict(columns='N {}', panels=f'N/{layouts.PANEL} {{}} 256').get(layout, '{} N')
    rows = expected[-1 if layout == 'columns' else -2]
    raise ValueError(f'values {values.shape} do not fit {K} inputs; {spec} packs {K} rows of the '
                     f'axis that is summed over into {rows}: expected '
                     f'{(*batch, *letters.format(rows).split())} of layout {layout!r}')
  stored = [layouts.element(spec)] if layout == 'int4' else [jnp.dtype('uint8')] + (
      [jnp.dtype('int8')] if spec.bits == 8 else [])
  if values.dtype not in stored:
    raise ValueError(f'values are {values.dtype}; expected {" or ".join(map(str, stored))}, as '
                     f'layout {layout!r} has {spec}')
  G = -(-K // spec.group) if spec.group else 1
  fits = [(*batch, 1, 1)] if spec.tensor else [(*batch, G, N), (*batch, G, 1)]
  if tuple(scale.shape) not in fits or (
      not spec.symmetric if zero is None else zero.shape != scale.shape):
    raise ValueError(f'scale {tuple(scale.shape)} does not fit values {values.shape} of {spec}; '
                     f'expected {fits[0]}, and zero the same')
  if hasattr(scale, 'dtype') and not spec.code.startswith('mx'):         # or it is in codes itself
    operands.floats(scale=scale)


def forms(spec, layout, x, values, scale, zero):
  """Its Forms for these operands, the fastest first.

  XLA is the fastest form on a TPU, and of 8 bits on a GPU, of a weight with one scale a column: it
  multiplies by what it widens on the way, and writes nothing out. Tables (nf4, ...) in a kernel are
  slower than a float weight on a TPU, since the vector units look them up one by one: XLA writes
  such a weight out once a use.
  """
  pallas = functools.partial(_pallas, spec)
  return [Form(functools.partial(_native, spec), 'native', ('cpu',),
               cpu.why_not(x, scale, zero, spec, layout), True),
          Form(pallas, 'pallas', ('tpu',), why_no_kernel(spec, layout, x, values, scale), True),
          Form(functools.partial(_hopper, spec), 'pallas', ('cuda',),
               _why_not_hopper(spec, layout, x, values, scale), True),
          Form(functools.partial(_xla, spec, layout), 'xla'),
          Form(functools.partial(_reference, spec, layout), 'reference')]


def why_no_kernel(spec, layout, x, values, scale, whole=False):
  """None, or why the TPU kernel does not take these operands; `whole`: or one group of all rows."""
  if device.tpu() is None:
    return f'is for a TPU, and this program is for {device.kind()}'
  if device.tpu().generation < 5:
    return f'is slower than XLA on {device.kind()}, which widens integers slowly'
  if values.dtype != layouts.element(spec):              # so it is for 8 signed bits as they are
    return (f"takes integer codes in layout 'int4' (lean_jax.weights.prepared), and these are "
            f'{values.dtype} of {spec} in {layout!r}')
  if layout not in ('packed', 'int4'):
    return f"takes layout 'int4', and this is {layout!r}"
  if spec.tensor or (not whole if spec.group is None else spec.group % 32):
    return f'takes groups of multiples of 32 rows, and {spec} has others'
  if x.dtype != jnp.bfloat16:
    return f'takes activations in bfloat16, and these are {x.dtype}'
  if not hasattr(scale, 'dtype'):
    return 'takes scales that are floats, and these are codes themselves'
  if 0 in (*x.shape, *values.shape):
    return f'has nothing to multiply in {x.shape} and {values.shape}'
  return None


def _why_not_hopper(spec, layout, x, values, scale):
  """None, or why the GPU kernel does not take these operands."""
  why = device.why_no_hopper()
  if why is not None:
    return why
  if layout != 'columns':
    return f"takes layout 'columns' (lean_jax.weights.prepared), and this is {layout!r}"
  if spec.code != 'int' or spec.bits not in (2, 4, 8):
    return f'takes integers of 2, 4 or 8 bits, and {spec} has others'
  if spec.bits == 8 and not spec.group:
    return 'takes 8 bits in groups: with one scale a column XLA widens the integers on the way'
  if x.dtype != jnp.bfloat16:
    return f'takes activations in bfloat16, and these are {x.dtype}'
  if getattr(scale, 'dtype', None) not in (jnp.float32, jnp.bfloat16):
    return 'takes scales in float32 or bfloat16, and these are others'
  if 0 in (*x.shape, *values.shape):
    return f'has nothing to multiply in {x.shape} and {values.shape}'
  if values.shape[-2] % 64:
    return f'takes a multiple of 64 columns, and there are {values.shape[-2]}'
  from lean_jax.kernels.weight_only_matmul import gpu  # Pallas, where a GPU runs it
  if gpu.part(spec, x.shape[-1]) is None:
    return (f'takes groups of 16 (on JAX 0.10, 32) to 128 bytes, a power of two, or multiples of '
            f'128 rows, that divide K; {spec} of {x.shape[-1]} rows has others')
  if x.shape[-2] > gpu.MOST:
    return f'is for up to {gpu.MOST} rows: for more XLA writes the weight out once'
  return None


def _native(spec, x, values, scale, zero):
  return cpu.weight_only_matmul(x, values, scale, zero, spec)


def _pallas(spec, x, values, scale, zero):
  from lean_jax.kernels.weight_only_matmul import tpu  # Pallas, where a TPU runs it
  return tpu.weight_only_matmul(x, values, scale, zero, spec)


def _hopper(spec, x, values, scale, zero):
  from lean_jax.kernels.weight_only_matmul import gpu  # Pallas, where a GPU runs it
  return gpu.weight_only_matmul(x, values, scale, zero, spec)


def _reference(spec, layout, x, values, scale, zero):
  return reference.weight_only_matmul(x, values, scale, zero, spec, layout)


def _xla(spec, layout, x, values, scale, zero):
  return x @ reference.matrix(values, scale, zero, spec, x.shape[-1], x.dtype, layout)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(implementation, spec, layout, x, values, scale, zero):
  run = chosen('weight_only_matmul', forms(spec, layout, x, values, scale, zero), implementation)
  return run(x, values, scale, zero)


def _forward(implementation, spec, layout, x, values, scale, zero):
  y = _product(implementation, spec, layout, x, values, scale, zero)
  return y, (x, values, scale, zero)


def _backward(implementation, spec, layout, saved, g):
  x, values, scale, zero = saved
  floats, rest = _split(scale, zero)

  def product(x, floats):
    return _xla(spec, layout, x, values, *_joined(floats, rest))
  _, pull = jax.vjp(product, x, floats)
  dx, dfloats = pull(g)
  none = jax.tree.map(lambda a: None, rest)
  dscale, dzero = _joined(dfloats, none)
  return dx, None, dscale, dzero


def _split(scale, zero):
  """Leaves of (scale, zero): the floats, and the others with None in the floats' places."""
  is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
  return (jax.tree.map(lambda a: a if is_float(a) else None, (scale, zero)),
          jax.tree.map(lambda a: None if is_float(a) else a, (scale, zero)))


def _joined(floats, rest):
  """The inverse of `_split`."""
  return jax.tree.map(lambda a, b: b if a is None else a, floats, rest,
                      is_leaf=lambda a: a is None)


_product.defvjp(_forward, _backward)
