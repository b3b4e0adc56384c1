"""The weight of DoRA: any weight, the lengths of its columns apart from their directions."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax.weights.adapter import Adapter
from lean_jax.weights.base import (
  Weight,
  broadcast,
  positions,
  pytree,
  times,
  times_rows,
  to_matrix,
)


@pytree
class Magnitude(Adapter):
  """m V / ||V||, V the base, the norm of each output's column of it.

  Liu et al. 2024 (arXiv:2402.09353), equation 5. The norm gets no gradient (section 4.3).
  """
  base: Weight
  magnitude: Any                                       # m, [*n *e *o], float32
  trained = ('magnitude',)

  def unbox(self):
    value = meta.unbox(self.base)
    ratio = self._ratio(column_norms(value, self.dims, self.magnitude.shape))
    return value * broadcast(ratio, self.dims, 'o').astype(value.dtype)

  def einsum(self, eqn, x):
    return times(eqn, self.base.einsum(eqn, x), 'o', self._own_ratio(), self.dims)

  def grouped(self, x, sizes):
    return times_rows(self.base.grouped(x, sizes), self._own_ratio(), sizes)

  def take(self, ids):
    if self.dims != 'oi':
      return super().take(ids)
    rows = self.base.take(ids)                         # [*ids I]: columns of the matrix
    norms = jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)
    ratio = jnp.take(self.magnitude, ids) / _constant(norms)
    return rows * ratio[..., None].astype(rows.dtype)

  def names(self):
    at = sum((positions(self.dims, kind) for kind in 'neo'), ())
    return dataclasses.replace(self, base=self.base.names(),
                               magnitude=tuple(self.axes[k] for k in at))

  def _own_ratio(self):
    return self._ratio(column_norms(meta.unbox(self.base), self.dims, self.magnitude.shape))

  def _ratio(self, norms):
    return self.magnitude / _constant(norms)


def column_norms(value, dims, shape):
  """The norm of what each output sums over, of a dense value; of a shape [*n *e *o], float32."""
  return jnp.linalg.norm(to_matrix(value, dims).astype(jnp.float32), axis=-2).reshape(shape)


def _constant(norms):
  """Without a gradient, and not 0: a column of zeros stays one."""
  return jnp.maximum(jax.lax.stop_gradient(norms), 1e-12)
