"""What every op asks of its operands, in the same words."""
import jax.numpy as jnp


def floats(**arrays):
  """Raises ValueError where one of the arrays, by their names, is not of floats; None is fine."""
  for name, a in arrays.items():
    if a is not None and not jnp.issubdtype(a.dtype, jnp.floating):
      raise ValueError(f'{name} is {a.dtype}; expected floats')


def integers(**arrays):
  """Raises ValueError where one of the arrays is not of integers."""
  for name, a in arrays.items():
    if not jnp.issubdtype(a.dtype, jnp.integer):
      raise ValueError(f'{name} is {a.dtype}; expected integers')


def groups(group, K):
  """How many groups of rows a matrix of K rows has; None is one of all.

  Raises:
    ValueError: a group of less than a row.
  """
  if group is not None and group < 1:
    raise ValueError(f'groups of {group} rows; expected 1 or more, or None for one of all rows')
  return -(-K // group) if group else 1
