"""Models whose adapters have been moved, as training moves them."""
import dataclasses

import jax
import numpy as np

from lean_jax import tree
from lean_jax.adapters.trained import trained


def stirred(model, by):
  """The model with all that its adapters train moved by normal numbers times `by`."""
  train, rest = tree.split(model.params, trained(model.params))
  leaves, shape = jax.tree.flatten(train)
  rng = np.random.default_rng(3)
  leaves = [x + by * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  return dataclasses.replace(model, params=tree.merge(shape.unflatten(leaves), rest))
