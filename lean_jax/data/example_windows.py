"""Examples in rows of one length: several in each, apart from each other, or one in each."""
import dataclasses
import hashlib

import numpy as np

from lean_jax.data.examples import Example
from lean_jax.data.windows import Rows
from lean_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleWindows(Rows):
  """Rows of examples, for `Batches`.

  Attributes:
    array: [n T] int32, ids, 0 where there is none.
    segments: [n T] int32: which example of its row a token is of, from 1 on; 0 where of none.
    labels: [n T] int32: the token after, where it is learned; else -1.
    packed: whether a row may have several examples.
    examples: how many are in the rows, the parts of long ones counted each.
    cut: how many of them lost an end.
    left_out: how many are in none, since nothing that is learned had room.
  """
  array: np.ndarray
  segments: np.ndarray
  labels: np.ndarray
  packed: bool
  examples: int
  cut: int
  left_out: int

  @property
  def learned(self) -> int:
    """Tokens that are learned."""
    return int((self.labels >= 0).sum())

  @property
  def fingerprint(self) -> str:
    """A hash of all rows."""
    digest = hashlib.blake2b(f'{self.array.shape} {self.packed}'.encode(), digest_size=16)
    for x in (self.array, self.segments, self.labels):
      digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()

  def batch(self, rows) -> dict[str, np.ndarray]:
    """tokens and labels of rows, and `segments`, or of one example a row its `mask`: [rows T]."""
    out = dict(tokens=self.array[rows], labels=self.labels[rows])
    segments = self.segments[rows]
    return out | (dict(segments=segments) if self.packed else dict(mask=segments > 0))


def arranged(examples, window, *, packed=True):
  """The ExampleWindows of Examples.

  A plain text, all of which is learned, goes on in another row where it is longer than a window.
  Of another example the end is cut, and it is left out where nothing that is learned is before.

  Args:
    examples: Examples.
    window: tokens a row at most; T is what the fullest has.
    packed: whether several examples share a row, each put where it leaves the least room.

  Raises:
    InputError: a window too short, or no example that has a token to learn in it.
  """
  if window < 2:
    raise InputError(f'windows of {window} tokens; give 2 or more, for a token and the one after')
  kept, cut, left_out = [], 0, 0
  for example in examples:
    parts = _parts(example, window)
    learns = [p for p in parts if p.learned[1:].any()]
    cut += bool(learns) and sum(map(len, (p.ids for p in parts))) < len(example.ids)
    left_out += not learns
    kept += learns
  if not kept:
    raise InputError(f'none of {len(examples)} examples has a token to learn within {window} '
                     'tokens; give a longer window, or answers')
  lengths = np.array([len(e.ids) for e in kept])
  rows = _packed(lengths, window) if packed else [[k] for k in range(len(kept))]
  T = max(int(lengths[some].sum()) for some in rows)
  ids, segments = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), np.int32)
  labels = np.full((len(rows), T), -1, np.int32)
  for row, some in enumerate(rows):
    at = 0
    for number, k in enumerate(some, 1):
      own, learned = kept[k]
      n = len(own)
      ids[row, at:at + n], segments[row, at:at + n] = own, number
      labels[row, at:at + n - 1] = np.where(learned[1:], own[1:], -1)
      at += n
  return ExampleWindows(ids, segments, labels, packed, len(kept), cut, left_out)


def _parts(example, window):
  """An example, or what of it has room in windows of its own."""
  n = len(example.ids)
  if n <= window or not example.learned[1:].all():
    return [Example(*(x[:window] for x in example))]
  return [Example(*(x[k:k + window] for x in example)) for k in range(0, n, window)]


def _packed(lengths, window):
  """[[which examples]] of each row: the longest first, each into the fullest row that has room."""
  rows, with_room = [], [[] for _ in range(window + 1)]        # rows by how many tokens they miss
  open_rows = np.zeros(window + 1, bool)
  for k in np.argsort(-lengths, kind='stable'):
    n = int(lengths[k])
    fits = np.flatnonzero(open_rows[n:])
    if fits.size:
      room = n + int(fits[0])
      row = with_room[room].pop()
      open_rows[room] = bool(with_room[room])
    else:
      room, row = window, len(rows)
      rows.append([])
    rows[row].append(int(k))
    with_room[room - n].append(row)
    open_rows[room - n] = True
  return rows
