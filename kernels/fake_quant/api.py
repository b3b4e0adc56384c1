"""fake_quant: the rounding of a format forward, and backward the identity or a learned step's.

The straight-through estimator: Bengio et al. 2013 (arXiv:1308.3432), section 4; for
quantization-aware training Jacob et al. 2018 (arXiv:1712.05877), section 3.

XLA makes two loops of the rounding, one that finds the scales and one that rounds, and one of the
gradient; so no platform has a kernel of its own. `benchmarks/fake_quant.py` has the figures.
"""
import functools

import jax
import jax.numpy as jnp

from lean_jax.kernels.fake_quant import learned, reference
from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.quantization.spec import QuantSpec


def fake_quant(w, spec, *, implementation=None):
  """w rounded to a format, in its own dtype; its gradient is that of w.

  It is, bit for bit, what the codes of `formats.quantize` stand for. What shares a scale with a NaN
  is NaN.

  Args:
    w: [..., I, O], float; I is the axis that a product sums over.
    spec: a QuantSpec.
    implementation: None is the fastest that the platform has; or 'xla' or 'reference'.

  Raises:
    ValueError: shapes or dtypes do not fit, a group is larger than I, or an implementation that is
      not there.
  """
  _check(w, spec)
  return _straight(w, (functools.partial(reference.fake_quant, spec=spec), implementation))


def fake_quant_rows(x, *, implementation=None):
  """x [... M K], float, rounded to 8 bits, one symmetric range a row; its gradient is that of x.

  A row with a NaN is NaN. `implementation` and what raises are those of `fake_quant`.
  """
  _check_floats('x', x, '[... M K]')
  return _straight(x, (reference.fake_quant_rows, implementation))


def learned_step(v, step, offset, spec, *, implementation=None):
  """v rounded to the grid of its step and offset, in v's dtype; see `learned` for its gradients.

  It is, bit for bit, what the codes of `learned.encode` stand for. A NaN stays one.

  Args:
    v: [..., I, O], float.
    step: [..., G, O], float; [..., 1, 1] where one serves a matrix.
    offset: as step, or None of a symmetric spec.
    spec: QuantSpec of code 'int'.
    implementation: as of `fake_quant`.

  Raises:
    ValueError: as of `fake_quant`; or the spec is none of integers.
  """
  _check(v, spec)
  if spec.code != 'int':
    raise ValueError(f'{spec} is no grid of integers, and has no step to learn')
  *batch, I, O = v.shape
  want = (*batch, 1, 1) if spec.tensor else (*batch, -(-I // (spec.group or I)), O)
  if step.shape != want or (offset is None) != spec.symmetric or (
      offset is not None and offset.shape != want):
    raise ValueError(f'step {step.shape} and offset {None if offset is None else offset.shape} do '
                     f'not fit {v.shape} of {spec}; expected {want}, and offset '
                     + ('None' if spec.symmetric else 'the same'))
  _check_floats('step', step, str(want))
  return _learned(v, step, offset, (spec, implementation))


def forms(run):
  """The Forms of a function: what it says in jnp is what XLA fuses."""
  return [Form(run, 'xla'), Form(run, 'reference')]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _straight(x, how):
  run, implementation = how
  return chosen('fake_quant', forms(run), implementation)(x)


_straight.defvjp(lambda x, how: (_straight(x, how), None), lambda how, _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _learned(v, step, offset, how):
  spec, implementation = how
  run = functools.partial(learned.rounded, spec=spec)
  return chosen('fake_quant', forms(run), implementation)(v, step, offset)


_learned.defvjp(lambda v, step, offset, how: (_learned(v, step, offset, how), (v, step, offset)),
                lambda how, saved, g: learned.gradients(*saved, g, how[0]))


def _check(w, spec):
  if not isinstance(spec, QuantSpec):
    raise ValueError(f'spec is {spec!r}; expected a QuantSpec, as of parse_spec')
  _check_floats('w', w, '[... I O]')
  if spec.group and spec.group > w.shape[-2]:
    raise ValueError(f'groups of {spec.group} inputs, and w {w.shape} has {w.shape[-2]}')


def _check_floats(name, x, shape):
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} is {x.dtype} {x.shape}; expected floats {shape}')
