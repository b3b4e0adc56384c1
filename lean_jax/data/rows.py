"""Batches of rows that somebody makes: a pure function of a seed and a step."""
import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from lean_jax.errors import InputError

RUN = 50                      # batches whose rows are sorted by length at once


@dataclasses.dataclass(frozen=True, eq=False)
class RowBatches:
  """Endless training batches, as `training.loop.fit` takes them.

  Every row comes once an epoch, in a new order each epoch. An epoch may end within a batch; by
  length it does not, and what is left of its rows waits for another.

  Attributes:
    count: of rows.
    batch: rows a step.
    seed: of the order.
    make: numbers of rows [batch] to a batch, {name: array of rows}.
    content: of the rows, a hash: two different ones are told apart by it.
    lengths: of the rows [count], so that rows of a batch are of about one length and little of it
      is padding; None draws them whatever their length.
  """
  count: int
  batch: int
  seed: int
  make: Callable
  content: str
  lengths: np.ndarray | None = None

  def __post_init__(self):
    if not 1 <= self.batch <= self.count:
      raise InputError(f'a batch of {self.batch} of {self.count} rows; give more rows, or a batch '
                       f'from 1 to {self.count}')

  @property
  def fingerprint(self) -> str:
    """What the batches are a function of."""
    return f'{self.content} {self.batch} {self.seed}{"" if self.lengths is None else " by length"}'

  @functools.cached_property
  def _order(self):
    return functools.lru_cache(maxsize=2)(
        lambda epoch: np.random.default_rng((self.seed, epoch)).permutation(self.count))

  @functools.cached_property
  def _sorted(self):
    def batches(epoch):
      whole = self._order(epoch)[:self.count // self.batch * self.batch]
      runs = np.split(whole, range(RUN * self.batch, len(whole), RUN * self.batch))
      rows = np.concatenate([run[np.argsort(-self.lengths[run], kind='stable')] for run in runs])
      return np.random.default_rng((self.seed, epoch, 1)).permutation(
          rows.reshape(-1, self.batch))
    return functools.lru_cache(maxsize=2)(batches)

  def rows(self, step) -> np.ndarray:
    """The numbers of the rows of a step's batch."""
    if self.lengths is not None:
      epoch, k = divmod(int(step), self.count // self.batch)
      return self._sorted(epoch)[k]
    first = int(step) * self.batch
    return np.array([self._order(k // self.count)[k % self.count]
                     for k in range(first, first + self.batch)])

  def __getitem__(self, step):
    return self.make(self.rows(step))
