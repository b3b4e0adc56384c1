"""The one place where a model multiplies by a trained matrix."""
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.weights import Dense
from lean_jax.weights.base import positions


class Linear(nn.Module):
  """y = einsum(eqn, x, kernel) + bias, whatever kind of weight the kernel is."""
  eqn: str                      # 'btd,df->btf'
  shape: tuple[int, ...]        # of the kernel
  axes: tuple[str | None, ...]  # its logical names
  dtype: Any = jnp.float32      # of the product
  bias: bool = False            # of the kept axes, the last ones of the result

  @nn.compact
  def __call__(self, x):
    dims = dims_of(self.eqn)
    w = weight(self, 'kernel', dims, self.shape, self.axes)
    y = w.einsum(self.eqn, x.astype(self.dtype))
    if self.bias:
      kept = tuple(self.shape[k] for k in positions(dims, 'o'))
      b = w.bias(self.param('bias', nn.initializers.zeros, kept))
      y = y + b.reshape((1,) * (y.ndim - len(kept)) + kept).astype(y.dtype)
    return y


class Embedding(nn.Module):
  """A table of vectors, and its transpose as an output head (`attend`)."""
  vocabulary: int
  width: int
  dtype: Any = jnp.float32

  def setup(self):
    # A standard deviation of width ** -1/2 gives a tied head logits of order one.
    self.table = weight(self, 'table', 'oi', (self.vocabulary, self.width), ('vocab', 'embed'))

  def __call__(self, tokens):
    return self.table.take(tokens).astype(self.dtype)          # [B T D]

  def attend(self, x):
    """Logits [B T V] of x [B T D]."""
    return self.table.einsum('btd,vd->btv', x.astype(self.dtype))


def weight(module, name, dims, shape, axes):
  """The weight at `name`: the one in params, of whatever kind, or a fresh Dense.

  A stored weight is read past Linen's check of shapes: packed integers do not have the dense one.
  """
  if module.has_variable('params', name):
    return module.get_variable('params', name)
  # Variance 1 / inputs (LeCun). Not truncated: that takes seconds to compile.
  init = nn.initializers.variance_scaling(
      1., 'fan_in', 'normal', positions(dims, 'i'), positions(dims, 'o'), positions(dims, 'e'))
  return module.param(name, lambda key: Dense(init(key, shape), dims, axes), unbox=False)


def dims_of(eqn):
  """The letters of a kernel's axes: 'btd,df->btf' gives 'io'."""
  xs, rest = eqn.split(',')
  ws, out = rest.split('->')
  return ''.join('e' if c in xs and c in out else 'i' if c in xs else 'o' for c in ws)
