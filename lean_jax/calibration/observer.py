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

  def __init__(self, mask=None, *, histogram=False):
    self.found, self._mask, self._wanted = {}, mask, dict(histogram=histogram)
    self._seen = []                        # (input, how it is read, its Statistics)
    self._trace = _trace()

  def take(self, name, x, eqn, w, sizes=None):
    """Notes the input of one product."""
    if _trace() != self._trace:            # inside of a loop: its values do not get out
      return
    how = (eqn, w.dims) if sizes is None else (id(sizes),)
    new = next((s for other, way, s in self._seen if other is x and way == how), None)
    if new is None:
      new = self._statistics(x, eqn, w, sizes)
      self._seen.append((x, how, new))     # queries, keys and values read the same
    self.found[name] = self.found[name].add(new) if name in self.found else new

  def _statistics(self, x, eqn, w, sizes):
    if sizes is not None:
      return statistics.of_groups(x, sizes, **self._wanted)
    rows, _ = as_matmul(eqn, x, w.dims, w.shape)
    mask = self._mask
    fits = mask is not None and rows.ndim == 2 and mask.size == rows.shape[0]
    return statistics.of_matrix(rows, mask.reshape(-1) if fits else None, **self._wanted)


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
