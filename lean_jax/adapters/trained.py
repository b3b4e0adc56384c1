"""What of an adapted model trains."""
import re

from lean_jax import tree
from lean_jax.weights import Adapter, Wrapper


def trained(params):
  """A pattern of the names of all arrays that adapters train; None where there is no adapter."""
  names = []
  for name, w in tree.named_weights(params).items():
    while isinstance(w, Wrapper):
      if isinstance(w, Adapter):
        names += [f'{name}/{field}' for field in w.trained]
      name, w = f'{name}/base', w.base
  return '|'.join(map(re.escape, names)) or None
