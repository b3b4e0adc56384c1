"""An adapter and its base as one weight again."""
from lean_jax.weights import Adapter, Dense


def merge(w):
  """The dense weight that an adapted one stands for; other kinds stay as they are."""
  return Dense(w.unbox(), w.dims, w.axes) if isinstance(w, Adapter) else w
