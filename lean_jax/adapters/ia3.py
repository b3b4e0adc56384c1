"""IA3: inner activations times trained numbers."""
import jax.numpy as jnp

from lean_jax.adapters.lora import sides
from lean_jax.errors import InputError
from lean_jax.weights import Scaled

# The paper's places, by the names of this library: keys, values, and what the second product of a
# feed-forward block is given.
PLACES = ((r'(.*/)?layers/.*/(k|v)/kernel', dict(side='outputs')),
          (r'(.*/)?layers/.*/down/kernel', dict(side='inputs')))


def ia3(w, side):
  """The weight with each of its outputs, or inputs, times a number that begins as 1.

  Liu et al. 2022 (arXiv:2205.05638), section 3.3.

  Outputs are scaled with the product's bias, where there is one.

  Args:
    w: a weight of any kind.
    side: 'outputs' or 'inputs'.

  Raises:
    InputError: no such side.
  """
  both, inputs, outputs = sides(w)
  of = dict(inputs=inputs, outputs=outputs)
  if side not in of:
    raise InputError(f'no side {side!r}; there are: inputs, outputs')
  return Scaled(w, jnp.ones(both + of[side]), side[0])
