"""Quantization-aware training: the model trains as the integers it will be."""
from lean_jax.errors import InputError
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, FakeQuantized


def fake_quantize(w, spec):
  """The weight rounded to `spec` in every forward pass, straight through backward.

  Jacob et al. 2018 (arXiv:1712.05877), section 3. Of a random start with 'w1.58a8' or 'w1a8' this
  is BitNet (Ma et al. 2024, arXiv:2402.17764, section 2; Wang et al. 2023, arXiv:2310.11453,
  section 2). After training, `rtn(w, spec)` stores the integers; nothing changes by that.

  Raises:
    InputError: the weight is not a plain one, the name is no scheme, or its activations need a
      range.
  """
  spec = parse_spec(spec)
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot be trained as {spec}; start from the '
                     'float model')
  if spec.static:
    raise InputError(f'{spec} needs a range of activations: train as w8a8, and apply pact or ema')
  return FakeQuantized(w, spec)
