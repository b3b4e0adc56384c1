"""Quantization-aware training: the model trains as the integers it will be."""
from lean_jax.errors import InputError
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, FakeQuantized


def fake_quantize(w, spec):
  """The weight rounded to `spec` in every forward pass, straight through backward.

  Jacob et al. 2018 (arXiv:1712.05877), section 3. After training, `rtn(w, spec)` stores the
  integers; nothing changes by that.

  Raises:
    InputError: the weight is not a plain one, or the name is no scheme.
  """
  spec = parse_spec(spec)
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot be trained as {spec}; start from the '
                     'float model')
  return FakeQuantized(w, spec)
