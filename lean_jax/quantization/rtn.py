"""Rounding to nearest: quantization that looks at nothing but the weight."""
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, Quantized, Trained


def rtn(w, spec):
  """The weight in the integer format `spec` (a QuantSpec or its name, 'w4a16-g64').

  A weight in training becomes the integers that it was trained as, its learned steps, offsets and
  ranges theirs; an already quantized one, or one with an adapter, is refused.

  Raises:
    InputError: the weight is quantized already, carries an adapter, the name is no scheme, or its
      activations need a range that the weight does not have.
  """
  spec = parse_spec(spec)
  trained, w = (w, w.base) if isinstance(w, Trained) else (None, w)
  if trained is not None and trained.spec != spec:
    raise InputError(f'the weight was trained as {trained.spec}, not {spec}; quantize it to '
                     f'{trained.spec}')
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot be rounded to {spec}; start from the '
                     'float model (merge an adapter first)')
  if trained is not None:
    return trained.quantized(spec)
  if spec.static:
    raise InputError(f'{spec} needs a range of activations: fake_quantize as w8a8, apply ema, and '
                     'calibrate or train')
  return Quantized.of(meta.unbox(w), spec, w.dims, w.axes)
