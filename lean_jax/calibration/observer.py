"""Weights that note what they are multiplied with."""
import dataclasses
from typing import Any

import jax
import jax.extend.core
from flax.core import meta

from lean_jax import tree
from lean_jax.calibration import statistics
from lean_jax.weights.base import Weight, Wrapper, as_matmul, pytree, static


class Notes:
  """What the weights of one traced call were multiplied with.

  Attributes:
    found: {name: Statistics}.
  """

  def __init__(self, mask=None, second=True):
    self.found, self._mask, self._second = {}, mask, second
    self._trace = _trace()

  def take(self, name, x, eqn, w, sizes=None):
    """Notes the input of one product."""
    if _trace() != self._trace:            # inside of a loop: its values do not get out
      return
    second = self._second
    if sizes is not None:
      new = statistics.of_groups(x, sizes, second=second)
    else:
      rows, _ = as_matmul(eqn, x, w.dims, w.shape)
      mask = self._mask
      fits = mask is not None and rows.ndim == 2 and mask.size == rows.shape[0]
      new = statistics.of_matrix(rows, mask.reshape(-1) if fits else None, second=second)
    self.found[name] = self.found[name].add(new) if name in self.found else new


@pytree
class Observed(Wrapper):
  """The base, which computes as ever; its inputs are noted."""
  base: Weight
  notes: Any = static()
  name: str = static()

  def unbox(self):
    return meta.unbox(self.base)

  def einsum(self, eqn, x):
    self.notes.take(self.name, x, eqn, self.base)
    return self.base.einsum(eqn, x)

  def grouped(self, x, sizes):
    self.notes.take(self.name, x, None, self.base, sizes)
    return self.base.grouped(x, sizes)

  def take(self, ids):
    return self.base.take(ids)

  def names(self):
    return dataclasses.replace(self, base=self.base.names())


def observed(params, notes):
  """The tree with each weight Observed."""
  at = jax.tree_util.tree_map_with_path
  return at(lambda path, w: Observed(w, notes, tree.name(path)) if tree.is_weight(w) else w,
            params, is_leaf=tree.is_weight)


def _trace():
  return jax.extend.core.get_opaque_trace_state(convention='flax')
