"""What of an adapted model trains."""
import re

import jax

from lean_jax import tree
from lean_jax.weights import Adapter, Wrapper
from lean_jax.weights.beside import is_beside


def trained(params):
  """A pattern of the names of all arrays that adapters train; None where there is no adapter."""
  names = []
  for name, w in tree.named_weights(params).items():
    while isinstance(w, Wrapper):
      if isinstance(w, Adapter):
        names += [f'{name}/{field}' for field in w.trained]
      name, w = f'{name}/base', w.base
  for path, w in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_beside):
    names += [f'{tree.name(path)}/{field}' for field in w.trained] if is_beside(w) else []
  return '|'.join(map(re.escape, names)) or None


def trained_with(params, parts):
  """`trained`, and what of the tree's own `parts` has no adapter: a fresh head learns with them."""
  pattern = trained(params)
  if pattern is None:
    return None
  adapted = tuple(f'{name}/' for name, w in tree.named_weights(params).items()
                  if isinstance(w, Wrapper))
  own = [name for name in tree.named_arrays(params)
         if name.split('/')[0] in parts and not name.startswith(adapted)]
  return '|'.join([pattern, *map(re.escape, own)])
