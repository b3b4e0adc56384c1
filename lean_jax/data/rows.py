"""Batches of rows that somebody makes: a pure function of a seed and a step."""
import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from lean_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class RowBatches:
  """Endless training batches, as `training.loop.fit` takes them.

  Every row comes once an epoch, in a new order each epoch. An epoch may end within a batch.

  Attributes:
    count: of rows.
    batch: rows a step.
    seed: of the order.
    make: numbers of rows [batch] to a batch, {name: array of rows}.
    content: of the rows, a hash: two different ones are told apart by it.
  """
  count: int
  batch: int
  seed: int
  make: Callable
  content: str

  def __post_init__(self):
    if not 1 <= self.batch <= self.count:
      raise InputError(f'a batch of {self.batch} of {self.count} rows; give more rows, or a batch '
                       f'from 1 to {self.count}')

  @property
  def fingerprint(self) -> str:
    """What the batches are a function of."""
    return f'{self.content} {self.batch} {self.seed}'

  @functools.cached_property
  def _order(self):
    return functools.lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.count))

  def rows(self, step) -> np.ndarray:
    """The numbers of the rows of a step's batch."""
    first = int(step) * self.batch
    return np.array([self._order(k // self.count)[k % self.count]
                     for k in range(first, first + self.batch)])

  def __getitem__(self, step):
    return self.make(self.rows(step))
