"""Rounding to nearest: quantization that looks at nothing but the weight."""
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, FakeQuantized, Quantized


def rtn(w, spec):
  """The weight in the integer format `spec` (a QuantSpec or its name, 'w4a16-g64').

  A fake-quantized weight becomes the integers that it was trained as; an already quantized one, or
  one with an adapter, is refused.

  Raises:
    InputError: the weight is quantized already, carries an adapter, or the name is no scheme.
  """
  spec = parse_spec(spec)
  if isinstance(w, FakeQuantized):
    if w.spec != spec:
      raise InputError(f'the weight was trained as {w.spec}, not {spec}; quantize it to {w.spec}')
    w = w.base
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot be rounded to {spec}; start from the '
                     'float model (merge an adapter first)')
  return Quantized.of(meta.unbox(w), spec, w.dims, w.axes)
