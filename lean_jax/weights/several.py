"""The weight of several LoRA adapters over one base: one in use, or one for each row of a batch."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.weights.adapter import Adapter
from lean_jax.weights.base import Weight, positions, pytree, static
from lean_jax.weights.low_rank import LowRank, low_rank_equations


@pytree
class Several(Adapter):
  """base + a[k] @ b[k], k the adapter in use; which it is, is an array: to switch compiles nothing.

  With several numbers in `rows`, the first part of a batch's rows uses the first, and so on. Such a
  weight has no one dense value.
  """
  base: Weight
  a: Any                                               # [*n A *e *i R], of A adapters
  b: Any                                               # [*n A *e R *o], their scales in it
  rows: Any                                            # [*n k] int32, of 0 to A - 1; -1 is none
  adapters: tuple = static()                           # their names
  trained = ('a', 'b')

  @property
  def shape(self):
    return self.base.shape

  def unbox(self):
    return self._one('has no dense value').unbox()

  def einsum(self, eqn, x):
    if self.rows.shape[-1] == 1:
      return self._one().einsum(eqn, x)
    xs, ws = eqn.split('->')[0].split(',')
    B = next(c for c in xs if c not in ws)             # rows of the batch
    of = lambda eqn: eqn.replace(',', f',{B}')
    a, b = self._of_rows(x.shape[xs.index(B)], x.dtype)
    down, up = low_rank_equations(eqn, self.dims)
    return self.base.einsum(eqn, x) + jnp.einsum(of(up), jnp.einsum(of(down), x, a), b)

  def grouped(self, x, sizes):
    return self._one('cannot multiply rows that are sorted by expert').grouped(x, sizes)

  def take(self, ids):
    if self.rows.shape[-1] == 1 or self.dims != 'oi':
      return self._one('has no dense value').take(ids)
    rows = self.base.take(ids)
    a, b = self._of_rows(len(ids), rows.dtype)
    each = lambda a, b, ids: jnp.einsum('r...,dr->...d', jnp.take(b, ids, axis=-1), a)
    return rows + jax.vmap(each)(a, b, ids)

  def names(self):
    pick = lambda kinds: tuple(self.axes[k] for k in positions(self.dims, kinds))
    n, e = pick('n'), pick('e')
    return dataclasses.replace(
        self, base=self.base.names(), a=(*n, None, *e, *pick('i'), None),
        b=(*n, None, *e, None, *pick('o')), rows=(*n, None))

  def _one(self, otherwise=''):
    """The LowRank of the adapter in use, for all rows alike."""
    if self.rows.shape[-1] > 1:
      raise InputError(f'a weight with another adapter for each row {otherwise}; use one for all')
    pick = _picked
    for _ in range(self.dims.count('n')):
      pick = jax.vmap(pick)
    a, b = pick(self.a, self.b, self.rows)
    first = lambda x: jnp.squeeze(x, self.dims.count('n'))
    return LowRank(self.base, first(a), first(b), 1.)

  def _of_rows(self, count, dtype):
    """a and b of each of so many rows, [B *e *i R] and [B *e R *o]."""
    k = len(self.rows)
    if count % k:
      raise InputError(f'{k} adapters are in use, one a row, and the batch has {count} rows')
    a, b = _picked(self.a, self.b, jnp.repeat(self.rows, count // k))
    return a.astype(dtype), b.astype(dtype)


def _picked(a, b, rows):
  """a[rows] and b[rows], 0 where a row has no adapter."""
  there = (rows >= 0).reshape(-1, *(1,) * (b.ndim - 1))
  return a[rows], jnp.where(there, b[rows], 0)
