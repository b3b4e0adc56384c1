"""The weight of LLM.int8(): a rounded one, with the rows of a few inputs beside it as floats."""
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax.core import meta

from lean_jax.kernels.grouped_matmul import api as grouped_matmul
from lean_jax.weights.base import (
  Weight,
  as_matmul,
  from_matrix,
  matrix_names,
  pytree,
  to_matrix,
  unstacked,
)


@pytree
class Outliers(Weight):
  """rest + rows where they belong: the products of a few inputs are apart from the others'.

  Dettmers et al. 2022 (arXiv:2208.07339), section 3.2. `rest` is to have zeros in these rows, and
  not to see these inputs (see `quantization/llm_int8.py`).
  """
  rest: Weight
  rows: Any                                            # [*n *e k O], floats
  index: Any                                           # [*n *e k] int32: of which input; I is none
  dims = property(lambda self: self.rest.dims)
  axes = property(lambda self: self.rest.axes)

  def padded(self, count):
    """The same with room for `count` rows, no fewer than it has: to be stacked with others."""
    more = count - self.index.shape[-1]
    pad = lambda x, axis, value: jnp.pad(
        x, [(0, more if k == x.ndim + axis else 0) for k in range(x.ndim)], constant_values=value)
    return dataclasses.replace(self, rows=pad(self.rows, -2, 0),
                               index=pad(self.index, -1, self._inputs))

  @staticmethod
  def alike(weights):
    count = max(w.index.shape[-1] for w in weights)
    return [w.padded(count) for w in weights]

  def unbox(self):
    value = meta.unbox(self.rest)
    matrix = to_matrix(value, self.dims)
    at = jnp.arange(self._inputs).reshape((1,) * (self.index.ndim - 1) + (-1, 1))
    place = self.index[..., None, :] == at                             # [*n *e I k]
    matrix = matrix + place.astype(value.dtype) @ self.rows.astype(value.dtype)
    return from_matrix(matrix, self.dims, unstacked(value.shape, self.dims))

  def einsum(self, eqn, x):
    x2, restore = as_matmul(eqn, x, self.dims, unstacked(self.rest.shape, self.dims))
    few = _taken(x2, self.index[..., None, :])
    return self.rest.einsum(eqn, x) + restore(few @ self.rows.astype(x.dtype))

  def grouped(self, x, sizes):
    index = jnp.repeat(self.index, sizes, axis=0, total_repeat_length=x.shape[0])
    few = grouped_matmul.grouped_matmul(_taken(x, index), self.rows, sizes)
    return self.rest.grouped(x, sizes) + few

  def names(self):
    *batch, _, o = matrix_names(self.dims, self.axes)
    return dataclasses.replace(self, rest=self.rest.names(), rows=(*batch, None, o),
                               index=(*batch, None))

  @property
  def _inputs(self):
    """I, of a matrix."""
    return math.prod(n for n, d in zip(self.rest.shape, self.dims) if d == 'i')

  def _replace_axes(self, dims, axes):
    return dataclasses.replace(self, rest=self.rest._replace_axes(dims, axes))


def _taken(x, index):
  """Inputs x [... I] at index [... k], 0 where there is none."""
  return jnp.take_along_axis(x, index, axis=-1, mode='fill', fill_value=0)
