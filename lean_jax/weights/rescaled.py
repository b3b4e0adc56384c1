"""The weight whose inputs are rescaled before they meet it."""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from lean_jax.weights.base import (
  Weight,
  Wrapper,
  from_matrix,
  matrix_names,
  positions,
  pytree,
  to_matrix,
  unstacked,
)


@pytree
class Rescaled(Wrapper):
  """The base with input i times by[i]: of AWQ and SmoothQuant, where no earlier op takes it in."""
  base: Weight
  by: Any                                              # [*n *e I], float32

  def unbox(self):
    value = meta.unbox(self.base)
    matrix = to_matrix(value, self.dims) * self.by[..., None].astype(value.dtype)
    return from_matrix(matrix, self.dims, unstacked(value.shape, self.dims))

  def einsum(self, eqn, x):
    xs, ws = eqn.split('->')[0].split(',')
    sizes = unstacked(self.shape, self.dims)
    pick = lambda kind: positions(self.dims.replace('n', ''), kind)
    at = pick('e') + pick('i')
    by = self.by.reshape([sizes[k] for k in at]).astype(x.dtype)
    return self.base.einsum(eqn, jnp.einsum(f'{xs},{"".join(ws[k] for k in at)}->{xs}', x, by))

  def grouped(self, x, sizes):
    by = jnp.repeat(self.by, sizes, axis=0, total_repeat_length=x.shape[0])
    return self.base.grouped(x * by.astype(x.dtype), sizes)

  def names(self):
    *batch, i, _ = matrix_names(self.dims, self.axes)
    return dataclasses.replace(self, base=self.base.names(), by=(*batch, i))
