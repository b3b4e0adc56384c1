"""Numbers that follow the step: weights and temperatures of losses."""
import math

import optax

from lean_jax.errors import InputError

_FIELDS = {'kind', 'start', 'end', 'steps'}


def schedule(given, what, *, positive=False):
  """The function of the steps done that a config's entry stands for.

  Args:
    given: a number; or dict(kind='linear' or 'cosine', start=, end=, steps=), from one number to
      another, which then stays.
    what: it is, for the errors.
    positive: whether 0 is refused too; a number below it always is.

  Returns:
    steps done -> number: a float where it does not change, else a float32 scalar.

  Raises:
    InputError: what is given is none of these, or a number is out of range.
  """
  if not isinstance(given, dict):
    value = _number(given, what, positive)
    return lambda step: value
  if set(given) != _FIELDS or given['kind'] not in ('linear', 'cosine'):
    raise InputError(f'{what} {given}; expected a number, or '
                     "dict(kind='linear' or 'cosine', start=, end=, steps=)")
  start, end = (_number(given[k], f'{k} of {what}', positive) for k in ('start', 'end'))
  steps = given['steps']
  if not isinstance(steps, int) or steps < 1:
    raise InputError(f'steps {steps!r} of {what}; expected 1 or more')
  if given['kind'] == 'linear':
    return optax.linear_schedule(start, end, steps)
  falling = optax.cosine_decay_schedule(1., steps)                    # from 1 to 0
  return lambda step: end + (start - end) * falling(step)


def _number(x, what, positive):
  number = isinstance(x, (int, float)) and not isinstance(x, bool)
  if not number or not math.isfinite(x) or x < 0 or (positive and x == 0):
    raise InputError(f'{what} {x!r}; expected a number {"above" if positive else "of at least"} 0')
  return float(x)
