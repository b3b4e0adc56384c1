"""Batches of windows: a pure function of a seed and a step."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from lean_jax.data.windows import Windows
from lean_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
  """Endless training batches; `batches[step]` depends on nothing but these fields and the step.

  Every window comes once an epoch, in a new order each epoch. An epoch may end within a batch.

  Attributes:
    windows: at least one batch of them; or `examples.ExampleWindows`.
    batch: windows a step, over all hosts.
    seed: of the order, 0 to 2**32 - 1.
    shuffle: False keeps the windows in order.
    host, hosts: this process's number and how many there are; host p has rows [p::hosts] of the
      global batch, which is the same for any number of hosts.
  """
  windows: Windows
  batch: int
  seed: int
  shuffle: bool = True
  host: int = 0
  hosts: int = 1

  def __post_init__(self):
    if self.batch < 1 or len(self.windows) < self.batch:
      raise InputError(
          f'a batch of {self.batch} windows needs {self.batch * self.windows.length} tokens, the '
          f'corpus has {self.windows.tokens}; give more text, or a batch from 1 to '
          f'{len(self.windows)}')
    if self.hosts < 1 or self.batch % self.hosts:
      raise InputError(f'{self.hosts} hosts do not divide a batch of {self.batch}; give a multiple '
                       'of the hosts')
    if not 0 <= self.host < self.hosts:
      raise InputError(f'host {self.host} of {self.hosts}; give one from 0 to {self.hosts - 1}')
    if not 0 <= self.seed < 1 << 32:
      raise InputError(f'seed {self.seed}; give one from 0 to {(1 << 32) - 1}')

  @property
  def fingerprint(self) -> str:
    """What the batches of all hosts are a function of."""
    return f'{self.windows.fingerprint} {self.batch} {self.seed} {self.shuffle}'

  @functools.cached_property
  def _order(self):
    import grain  # a second to import
    order = grain.MapDataset.range(len(self.windows)).seed(self.seed)
    return (order.shuffle() if self.shuffle else order).repeat()

  def rows(self, step) -> np.ndarray:
    """The indices of the windows in this host's part of a step's batch."""
    if step < 0:
      raise InputError(f'step {step}; steps begin at 0')
    first = int(step) * self.batch
    return np.array([self._order[i] for i in range(first + self.host, first + self.batch,
                                                   self.hosts)])

  def __getitem__(self, step) -> dict[str, np.ndarray]:
    """tokens: [batch / hosts, length], int32; and what else the windows have, see their `batch`."""
    return self.windows.batch(self.rows(step))


def sequential(windows: Windows, batch) -> Iterator[dict[str, np.ndarray]]:
  """Every window once, in order, for evaluation.

  Yields tokens, [batch, length] int32, and mask, [batch, length] float32: 0 over the rows that
  fill up the last batch.
  """
  if batch < 1:
    raise InputError(f'a batch of {batch} windows; give 1 or more')
  for first in range(0, len(windows), batch):
    rows = windows.array[first:first + batch].astype(np.int32)
    tokens = np.zeros((batch, windows.length), np.int32)
    tokens[:len(rows)] = rows
    mask = np.zeros_like(tokens, np.float32)
    mask[:len(rows)] = 1
    yield dict(tokens=tokens, mask=mask)
