"""weight_only_matmul: activations as they are, times a weight in codes of few bits."""
import functools

import jax
import jax.numpy as jnp

from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.kernels.weight_only_matmul import cpu, reference
from lean_jax.quantization.packing import unit


def weight_only_matmul(x, values, scale, zero, spec, *, implementation=None):
  """x @ w, w being what the packed codes stand for.

  Gradients reach x, and scale where it is an array of floats.

  Args:
    x: [*E M K], float.
    values: [*E ceil(K * bits / 8) N], uint8, packed as `quantization.packing.pack` does; int8 or
      uint8 codes if they have 8 bits.
    scale: [*E G N] or [*E G 1], groups of rows as spec says; or quantization.nested.Nested.
    zero: as scale, or None where spec is symmetric.
    spec: QuantSpec.
    implementation: None is the fastest that the platform has for these operands; 'xla' writes the
      weight out in x's dtype; 'reference' in float32.

  Returns:
    [*E M N], in x's dtype; sums in float32.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation that is not there or does not run
      here.
  """
  *batch, _, K = x.shape
  each, size = unit(spec.bits)
  rows = -(-K // each) * size
  if values.ndim != x.ndim or values.shape[:-1] != (*batch, rows):
    raise ValueError(f'values {values.shape} do not fit x {x.shape}; {spec} packs {K} rows of the '
                     f'axis that is summed over into {rows}: expected {(*batch, rows, "N")}')
  N, G = values.shape[-1], -(-K // spec.group) if spec.group else 1
  fits = [(*batch, 1, 1)] if spec.tensor else [(*batch, G, N), (*batch, G, 1)]
  if tuple(scale.shape) not in fits or (zero is not None and zero.shape != scale.shape):
    raise ValueError(f'scale {tuple(scale.shape)} does not fit values {values.shape} of {spec}; '
                     f'expected {fits[0]}, and zero the same')
  return _product(implementation, spec, x, values, scale, zero)


def forms(spec, x, scale, zero):
  """Its Forms for these operands, the fastest first."""
  return [Form(functools.partial(_native, spec), 'native', ('cpu',),
               cpu.why_not(x, scale, zero, spec), local=True),
          Form(functools.partial(_xla, spec), 'xla'),
          Form(functools.partial(_reference, spec), 'reference')]


def _native(spec, x, values, scale, zero):
  return cpu.weight_only_matmul(x, values, scale, zero, spec)


def _reference(spec, x, values, scale, zero):
  return reference.weight_only_matmul(x, values, scale, zero, spec)


def _xla(spec, x, values, scale, zero):
  return x @ reference.matrix(values, scale, zero, spec, x.shape[-1], x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(implementation, spec, x, values, scale, zero):
  run = chosen('weight_only_matmul', forms(spec, x, scale, zero), implementation)
  return run(x, values, scale, zero)


def _forward(implementation, spec, x, values, scale, zero):
  return _product(implementation, spec, x, values, scale, zero), (x, values, scale, zero)


def _backward(implementation, spec, saved, g):
  x, values, scale, zero = saved
  floats, rest = _split(scale, zero)

  def product(x, floats):
    return _xla(spec, x, values, *_joined(floats, rest))
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
