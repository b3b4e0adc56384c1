"""DoRA: a weight's columns as lengths and directions, the directions adapted by LoRA."""
from flax.core import meta

from lean_jax.adapters.lora import lora, sides
from lean_jax.weights import Magnitude
from lean_jax.weights.magnitude import column_norms


def dora(w, rank, alpha, *, key, scaling='standard', dropout=0.):
  """m (W + BA) / ||W + BA||, m the norm of W's columns and BA zero at the start.

  Liu et al. 2024 (arXiv:2402.09353), section 4.2. Each step makes W's dense value for its norms.

  Args:
    w, rank, alpha, key, scaling, dropout: as of `lora`.

  Raises:
    InputError: as `lora`.
  """
  both, _, outputs = sides(w)
  m = column_norms(meta.unbox(w), w.dims, both + outputs)
  return Magnitude(lora(w, rank, alpha, key=key, scaling=scaling, dropout=dropout), m)
