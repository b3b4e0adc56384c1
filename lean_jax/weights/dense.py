"""The plain weight: one array."""
import dataclasses
from typing import Any

from lean_jax.errors import InputError
from lean_jax.weights.base import Weight, pytree, static


@pytree
class Dense(Weight):
  """An array with its axes named."""
  value: Any
  dims: str = static()
  axes: tuple = static()

  def unbox(self):
    return self.value

  def names(self):
    return dataclasses.replace(self, value=self.axes)

  def replace_boxed(self, value):
    return dataclasses.replace(self, value=value)


def check_dense(w, what):
  """Raises InputError for a weight that is not Dense: it 'cannot be {what}'."""
  if not isinstance(w, Dense):
    raise InputError(f'a {type(w).__name__} weight cannot be {what}; start from the float model')
