"""What the weights that adapt another, which stays as it is, have in common."""
from lean_jax.weights.base import Wrapper


class Adapter(Wrapper):
  """A weight in training beside its `base`, which is frozen."""
  trained = ()                  # the names of the fields that train


def bare(w):
  """The weight without its adapters."""
  while isinstance(w, Adapter):
    w = w.base
  return w
