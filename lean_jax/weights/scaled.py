"""The weight of IA3: any weight, its inputs or its outputs each times a trained number."""
import dataclasses
from typing import Any

from flax.core import meta

from lean_jax.weights.adapter import Adapter
from lean_jax.weights.base import Weight, broadcast, positions, pytree, static, times, times_rows


@pytree
class Scaled(Adapter):
  """The base with each input, or each output, times a number of its own, l.

  Liu et al. 2022 (arXiv:2205.05638), section 3.3: the outputs of keys and values, and the inputs
  of the feed-forward block's second product. Keys and values include their biases.
  """
  base: Weight
  by: Any                                              # l, [*n *e *side], float32
  side: str = static()                                 # 'i' or 'o'
  trained = ('by',)

  def unbox(self):
    value = meta.unbox(self.base)
    return value * broadcast(self.by, self.dims, self.side).astype(value.dtype)

  def einsum(self, eqn, x):
    if self.side == 'i':
      return self.base.einsum(eqn, times(eqn, x, 'i', self.by, self.dims))
    return times(eqn, self.base.einsum(eqn, x), 'o', self.by, self.dims)

  def grouped(self, x, sizes):
    if self.side == 'i':
      return self.base.grouped(times_rows(x, self.by, sizes), sizes)
    return times_rows(self.base.grouped(x, sizes), self.by, sizes)

  def bias(self, b):
    b = self.base.bias(b)
    return b if self.side == 'i' else b * self.by.astype(b.dtype)

  def names(self):
    at = sum((positions(self.dims, kind) for kind in f'ne{self.side}'), ())
    return dataclasses.replace(self, base=self.base.names(), by=tuple(self.axes[k] for k in at))
