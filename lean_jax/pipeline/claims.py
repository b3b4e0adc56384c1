"""What an experiment says should hold, held against what it measured."""
from lean_jax.errors import InputError


def check(claims, variants):
  """Each claim with its figures and whether it passed.

  Args:
    claims: dicts with `name`, `left` and `right` ('variant.figure'), and `bound` (left < bound *
      right, 1 without) or `equal` (left = right).
    variants: measured variants, dicts of figures with `name`.

  Returns:
    A list of dicts: name, figures, passed.

  Raises:
    InputError: a claim names a variant or a figure that was not measured.
  """
  by_name = {v['name']: v for v in variants}
  return [_one(claim, by_name) for claim in claims]


def _one(claim, by_name):
  left, right = (_figure(claim[side], by_name) for side in ('left', 'right'))
  figures = {claim['left']: left, claim['right']: right}
  if claim.get('equal'):
    return dict(name=claim['name'], figures=figures, passed=left == right)
  bound = claim.get('bound', 1)
  if bound != 1:
    figures['bound'] = bound
  # A NaN on either side compares false: the claim fails.
  return dict(name=claim['name'], figures=figures, passed=bool(left < bound * right))


def _figure(text, by_name):
  variant, _, figure = text.rpartition('.')
  if variant not in by_name:
    raise InputError(f'claim on {text!r}: no variant {variant!r}; there are: {", ".join(by_name)}')
  value = by_name[variant].get(figure)
  if value is None:
    raise InputError(f'claim on {text!r}: {variant} has no figure {figure!r}; it has: '
                     f'{", ".join(k for k, v in by_name[variant].items() if v is not None)}')
  return value
