"""The weight of VeRA: any weight, plus a frozen random product between two trained vectors."""
import dataclasses
from typing import Any

import jax.numpy as jnp

from lean_jax.weights.adapter import Adapter
from lean_jax.weights.base import Weight, positions, pytree
from lean_jax.weights.low_rank import LowRank


@pytree
class Vectors(Adapter):
  """base + A diag(d) B diag(b), A and B random, the same in all weights, and never trained.

  Kopiczko et al. 2023 (arXiv:2310.11454), equation 2, with the matrices in our order: inputs
  first. Layers that are stacked hold A and B each.
  """
  base: Weight
  inner: Any                                           # A, [*n *e *i R]
  outer: Any                                           # B, [*n *e R *o]
  d: Any                                               # [*n *e R]
  b: Any                                               # [*n *e *o]
  trained = ('d', 'b')

  @property
  def low_rank(self):
    """The same as a LowRank."""
    inputs = tuple(range(self.d.ndim - 1, self.inner.ndim - 1))
    d = jnp.expand_dims(self.d, inputs)
    b = jnp.expand_dims(self.b, self.d.ndim - 1)
    return LowRank(self.base, self.inner * d, self.outer * b, 1.)

  def unbox(self):
    return self.low_rank.unbox()

  def einsum(self, eqn, x):
    return self.low_rank.einsum(eqn, x)

  def grouped(self, x, sizes):
    return self.low_rank.grouped(x, sizes)

  def take(self, ids):
    return self.low_rank.take(ids)

  def names(self):
    low = LowRank(self.base, self.inner, self.outer, 1.).names()
    pick = lambda kinds: tuple(self.axes[k] for k in positions(self.dims, kinds))
    both = pick('n') + pick('e')
    return dataclasses.replace(self, base=low.base, inner=low.a, outer=low.b, d=both + (None,),
                               b=both + pick('o'))
