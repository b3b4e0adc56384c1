"""Quantization-aware training: the model trains as the integers it will be."""
from lean_jax.errors import InputError
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense, FakeQuantized


def fake_quantize(w, spec):
  """The weight rounded to `spec` in every forward pass, straight through backward.

  Jacob et al. 2018 (arXiv:1712.05877), section 3. After training, `rtn(w, spec)` stores the
  integers; nothing changes by that.

  Of a random start with 'w1.58a8' this is the BitLinear of BitNet b1.58 (Ma et al. 2024,
  arXiv:2402.17764, section 2), with 'w1a8' that of BitNet (Wang et al. 2023, arXiv:2310.11453,
  section 2.1). Q is 127, round is to the nearest even:

    b1.58    gamma = mean |W|;  W' = clip(round(W / gamma), -1, 1) gamma
    BitNet   alpha = mean W, beta = mean |W|;  W' = sign(W - alpha) beta, sign 0 = -1
    both     x' = clip(round(x Q / max |x|), -Q, Q) max |x| / Q, of each token;  y = x' W'

  The papers normalise x first, in every product. Here the models' own norms do that before
  q, k, v, gate and up; o and down have none, for checkpoints of the families know none there.
  The papers' two-stage learning rate and weight decay are left to the optimizer's settings.

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
