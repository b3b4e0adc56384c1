"""Examples for an encoder and a decoder: rows of a source, and of the target that is its answer."""
import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from lean_jax.data.examples import of_records, text_of
from lean_jax.data.windows import Rows
from lean_jax.errors import InputError

WANTED = 'for a target of a source, an example is instruction and output, or source and target'


class Pair(NamedTuple):
  """A source and its target: ids, [S] and [U] int32."""
  source: np.ndarray
  target: np.ndarray


def read_pairs(data, tokenizer):
  """The Pairs of a file, or of records.

  A record has `source` and `target`, or `instruction`, `output` and perhaps `input`: the source is
  then the instruction, and after an empty line the input, and the target the output. Both have the
  tokens that the tokenizer puts around a text, and a target its end whatever the tokenizer does.

  Args:
    data: as `examples.read_examples` takes it.
    tokenizer: a Tokenizer.

  Raises:
    InputError: no such file, no example in it, or one that cannot be used, with its line.
  """
  return of_records(data, lambda record, where: [of_record(record, where, tokenizer)])


def of_record(record, where, tokenizer):
  """The Pair of a record."""
  kinds = dict(source='target', instruction='output')
  found = [k for k in kinds if record.get(k) is not None] if isinstance(record, dict) else []
  if len(found) != 1:
    has = (f'a {type(record).__name__}' if not isinstance(record, dict) else
           ' and '.join(found) or ', '.join(map(repr, record)) or 'nothing')
    raise InputError(f'{where}: {WANTED}; this is {has}')
  (asked,), (answer,) = found, [kinds[k] for k in found]
  source, target = (text_of(record, k, where, wanted=WANTED) for k in (asked, answer))
  if asked == 'instruction' and record.get('input') is not None:
    more = text_of(record, 'input', where, empty=True)
    source = f'{source}\n\n{more}' if more else source
  source, target = tokenizer.encode_batch([source, target], special=True)
  if tokenizer.eos is not None and target[-1:].tolist() != [tokenizer.eos]:
    target = np.append(target, np.int32(tokenizer.eos))
  return Pair(source, target)


@dataclasses.dataclass(frozen=True, eq=False)
class SourceWindows(Rows):
  """Rows of a source and its target, for `Batches`; one example each.

  Attributes:
    array: [n S] int32, sources, 0 where there is none.
    mask: [n S] bool, which of them are real.
    decoder_tokens: [n U] int32, the start token, and the target but for its last token.
    labels: [n U] int32: the target; -1 where there is none.
    cut: how many examples lost an end.
  """
  array: np.ndarray
  mask: np.ndarray
  decoder_tokens: np.ndarray
  labels: np.ndarray
  cut: int
  packed = False
  left_out = 0

  @property
  def examples(self) -> int:
    """How many are in the rows."""
    return len(self)

  @property
  def length(self) -> int:
    """Tokens a row, of the source and of the target."""
    return self.array.shape[1] + self.labels.shape[1]

  @property
  def learned(self) -> int:
    """Tokens that are learned."""
    return int((self.labels >= 0).sum())

  @property
  def fingerprint(self) -> str:
    """A hash of all rows."""
    digest = hashlib.blake2b(f'{self.array.shape} {self.labels.shape}'.encode(), digest_size=16)
    for x in (self.array, self.mask, self.decoder_tokens, self.labels):
      digest.update(np.ascontiguousarray(x))
    return digest.hexdigest()

  def batch(self, rows) -> dict[str, np.ndarray]:
    """tokens and mask [rows S], decoder_tokens and labels [rows U], of rows."""
    return dict(tokens=self.array[rows], mask=self.mask[rows],
                decoder_tokens=self.decoder_tokens[rows], labels=self.labels[rows])


def arranged(pairs, window, start):
  """The SourceWindows of Pairs.

  Of a source that is too long the last tokens are left out, but the one that ends it, as where
  something is written of it; of a target the end.

  Args:
    pairs: Pairs.
    window: tokens of a source, and of a target, at most.
    start: the token that a target begins with.

  Raises:
    InputError: a window too short.
  """
  if window < 2:
    raise InputError(f'windows of {window} tokens; give 2 or more, for a token and its end')
  short = lambda ids: ids if len(ids) <= window else np.append(ids[:window - 1], ids[-1])
  sources, targets = [short(p.source) for p in pairs], [p.target[:window] for p in pairs]
  n, S, U = len(pairs), max(map(len, sources)), max(map(len, targets))
  array, decoder_tokens = np.zeros((n, S), np.int32), np.zeros((n, U), np.int32)
  mask, labels = np.zeros((n, S), bool), np.full((n, U), -1, np.int32)
  decoder_tokens[:, 0] = start
  for row, (source, target) in enumerate(zip(sources, targets)):
    array[row, :len(source)], mask[row, :len(source)] = source, True
    labels[row, :len(target)], decoder_tokens[row, 1:len(target)] = target, target[:-1]
  cut = sum(max(len(p.source), len(p.target)) > window for p in pairs)
  return SourceWindows(array, mask, decoder_tokens, labels, cut)
