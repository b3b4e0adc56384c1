"""A teacher's labels in few bits: the most probable tokens of each position, and all others as one.

Ids go up, and are written as Elias and Fano write a set of numbers (Elias 1974, 'Efficient storage
and retrieval by content and address of static files'; Fano 1971): the low bits of each, and the
high parts as ones among a zero for each value that they may have, about 2 + log2(V / k) bits an id
in place of log2(V). Log-probabilities at temperature 1, and that of all others, are rounded to
`bits` bits between -RANGE and 0; what is less probable counts as exp(-RANGE).

Half a step at most is lost of each. Read back, they are scaled to a sum of 1, which moves all by
half a step at most: together e = RANGE / (2**bits - 1) nats. With p the probabilities, r those read
back and q a student's, |log r - log p| <= e gives |r - p| <= (exp(e) - 1) p, and so

    |KL(q || r) - KL(q || p)| <= e
    |KL(r || q) - KL(p || q)| <= (exp(e) - 1) (sum of p |log p - log q| + e)

where no probability is below exp(-RANGE); those that are add at most their own e**-RANGE to r.
"""
from typing import NamedTuple

import numpy as np

from lean_jax.errors import InputError

ENTRY = 24.8                  # bits of an entry, its share of all others' probability included
MOST, LEAST = 12, 6           # bits of a probability
RANGE = 24.                   # nats: exp(-24) is 4e-11


class Codes(NamedTuple):
  """How the labels of a window are written.

  Attributes:
    vocabulary: V.
    k: tokens of a position, 1 to V; of V there are no others.
    positions: P, that predict a token of the window.
  """
  vocabulary: int
  k: int
  positions: int

  @property
  def columns(self) -> int:
    """Probabilities of a position."""
    return min(self.k + 1, self.vocabulary)

  @property
  def low(self) -> int:
    """Bits of an id that are written as they are."""
    return (self.vocabulary // self.k).bit_length() - 1

  @property
  def high(self) -> int:
    """Bits of a position's high parts."""
    return self.k + ((self.vocabulary - 1) >> self.low)

  @property
  def bits(self) -> int:
    """Of a probability."""
    return min(MOST, int((self.k * (ENTRY - self.low) - self.high) // self.columns))

  @property
  def error(self) -> float:
    """The most that a log-probability above -RANGE is off, in nats."""
    return RANGE / (2 ** self.bits - 1)

  @property
  def sizes(self) -> tuple[int, int, int]:
    """Bytes of a record's low parts, high parts and probabilities."""
    return tuple(-(-self.positions * n // 8) for n in (
        self.k * self.low, self.high, self.columns * self.bits))


def codes(vocabulary, k, positions) -> Codes:
  """The Codes; raises InputError for numbers of tokens that there are not, or too few to be small.
  """
  if not isinstance(k, int) or not 1 <= k <= vocabulary:
    raise InputError(f'k {k!r} of a vocabulary of {vocabulary}; give 1 to {vocabulary}')
  if Codes(vocabulary, k, positions).bits < LEAST:
    least = next(n for n in range(k, vocabulary + 1) if Codes(vocabulary, n, 1).bits >= LEAST)
    raise InputError(f'k {k} of a vocabulary of {vocabulary} leaves too few bits for '
                     f'probabilities; give {least} or more')
  return Codes(vocabulary, k, positions)


def written(form, ids, log_probs) -> bytes:
  """The record of a window.

  Args:
    form: its Codes.
    ids: [P k], no two of a row alike, in any order.
    log_probs: [P k+1], of all others last; [P V] where k = V.
  """
  order = np.argsort(ids, axis=1)
  ids = np.take_along_axis(np.asarray(ids, np.int64), order, 1)
  probs = np.array(log_probs, np.float64)
  probs[:, :form.k] = np.take_along_axis(probs[:, :form.k], order, 1)
  if not probs.max() < 1e-3:                                    # a NaN is not either
    raise InputError('the teacher gives probabilities that are no numbers; look at its weights')
  ones = np.zeros((form.positions, form.high), np.uint8)
  np.put_along_axis(ones, (ids >> form.low) + np.arange(form.k)[None], 1, 1)
  steps = np.rint(np.clip(-probs, 0, RANGE) / RANGE * (2 ** form.bits - 1)).astype(np.int64)
  return b''.join((_joined(ids & ((1 << form.low) - 1), form.low), np.packbits(ones).tobytes(),
                   _joined(steps, form.bits)))


def read(form, records):
  """The labels of windows: ids [n P k] int32, going up, and log-probabilities [n P k+1] float32.

  Args:
    form: their Codes.
    records: n of `written`, bytes.

  Raises:
    InputError: one of another size.
  """
  odd = next((r for r in records if len(r) != sum(form.sizes)), None)
  if odd is not None:
    raise InputError(f'a record of {len(odd)} bytes among labels that take {sum(form.sizes)}; the '
                     'file was changed, make it again')
  n, P, k = len(records), form.positions, form.k
  array = np.frombuffer(b''.join(records), np.uint8).reshape(n, -1)
  low, ones, steps = np.split(array, np.cumsum(form.sizes[:2]), axis=1)
  ones = np.unpackbits(ones, axis=1, count=P * form.high).reshape(n * P, form.high)
  if (ones.sum(1) != k).any():
    raise InputError('a record has another number of tokens than its cache; the file was changed, '
                     'make it again')
  high = np.nonzero(ones)[1].reshape(n, P, k) - np.arange(k)[None, None]
  ids = (high << form.low) | _apart(low, form.low, P * k).reshape(n, P, k)
  steps = _apart(steps, form.bits, P * form.columns).reshape(n, P, form.columns)
  log_probs = steps.astype(np.float32) * np.float32(-RANGE / (2 ** form.bits - 1))
  log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))
  return ids.astype(np.int32), log_probs


def _joined(numbers, width) -> bytes:
  """Numbers below 2**width, at most 32 of them in bits each, without a gap between them."""
  flat = numbers.reshape(-1, 1).astype('>u4').view(np.uint8)                            # [n 4]
  return np.packbits(np.unpackbits(flat, axis=1)[:, 32 - width:]).tobytes()


def _apart(data, width, count):
  """`count` numbers [n count] of each row of bytes, as `_joined` has them."""
  bits = np.zeros((len(data), count, 32), np.uint8)
  bits[:, :, 32 - width:] = np.unpackbits(data, axis=1, count=count * width).reshape(
      len(data), count, width)
  return np.packbits(bits, axis=2).view('>u4')[..., 0].astype(np.int64)
