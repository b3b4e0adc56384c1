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
    batch: windows a step.
    seed: of the order, 0 to 2**32 - 1.
    shuffle: False keeps the windows in order.
  """
  windows: Windows
  batch: int
  seed: int
  shuffle: bool = True

  def __post_init__(self):
    if self.batch < 1 or len(self.windows) < self.batch:
      raise InputError(
          f'a batch of {self.batch} windows needs {self.batch * self.windows.length} tokens, the '
          f'corpus has {self.windows.tokens}; give more text, or a batch from 1 to '
          f'{len(self.windows)}')
    if not 0 <= self.seed < 1 << 32:
      raise InputError(f'seed {self.seed}; give one from 0 to {(1 << 32) - 1}')

  @property
  def fingerprint(self) -> str:
    """What the batches are a function of."""
    return f'{self.windows.fingerprint} {self.batch} {self.seed} {self.shuffle}'

  @property
  def length(self) -> int:
    """Tokens of a row."""
    return self.windows.length

  @functools.cached_property
  def _order(self):
    import grain  # a second to import
    order = grain.MapDataset.range(len(self.windows)).seed(self.seed)
    return (order.shuffle() if self.shuffle else order).repeat()

  def rows(self, step, which=slice(None)) -> np.ndarray:
    """The indices of the windows in a step's batch; of its rows `which` if given."""
    if step < 0:
      raise InputError(f'step {step}; steps begin at 0')
    wanted = int(step) * self.batch + np.arange(self.batch)[which]
    return np.array([self._order[int(i)] for i in wanted])

  def __getitem__(self, step) -> dict[str, np.ndarray]:
    """What the windows' `batch` gives of a step's rows: tokens, [batch, length] int32."""
    return self.part(step, slice(None))

  def part(self, step, rows) -> dict[str, np.ndarray]:
    """Some rows of a step's batch: what a host reads of it."""
    return self.windows.batch(self.rows(step, rows))


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
