"""Texts as two tokenizers read them, with the places where a token of both ends."""
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from lean_jax.data.packed import check_reads_text, opened
from lean_jax.data.windows import CHUNK, Windows, chunks
from lean_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Paired(Windows):
  """Windows of a student's tokens, and their texts in a teacher's.

  A window is a document, or a piece of one that ends where a token of both ends. Both read it
  after their own BOS, if they have one.

  Attributes:
    array: [n, length], the student's.
    records: of `record`, [n].
  """
  records: Any = None

  def batch(self, rows):
    """tokens, spans, teacher_tokens, teacher_spans: [B length] int32; mask, teacher_mask: bool.

    The span of a token is its number in the row, and -1 of BOS and padding.
    """
    found, out = self.records[rows], {}
    for side in ('', 'teacher_'):
      size = found[f'{side}size'].astype(np.int32)
      out |= {f'{side}{name}': found[f'{side}{name}'].astype(np.int32)
              for name in ('tokens', 'spans')}
      out[f'{side}mask'] = np.arange(self.length)[None] < size[:, None]
    return out


def record(length):
  """The dtype of a row on disk."""
  return np.dtype([(f'{side}{name}', '<i4', shape) for side in ('', 'teacher_')
                   for name, shape in (('tokens', (length,)), ('spans', (length,)), ('size', ()))])


@contextlib.contextmanager
def paired_windows(data, split, student, teachers, window, field):
  """The Paired of text that `data` names, for as long as the block lasts.

  Args:
    student, teachers: `lean_jax.Model`s that read text, the teachers by one tokenizer.
    window: tokens a row, of both.

  Raises:
    InputError: windows that are packed already, longer than a context, or no text for a row.
  """
  for model in (student, *teachers):
    check_reads_text(model)
    if window > model.config.context:
      raise InputError(f'windows of {window} tokens are longer than the context of '
                       f'{model.config.context}; give at most that')
  if isinstance(data, Windows):
    raise InputError('these windows are of one tokenizer, and the teacher has another; give the '
                     'text that they are of')
  source = opened(data, field)
  with tempfile.TemporaryDirectory() as folder:
    yield pair(source, split, student.tokenizer, teachers[0].tokenizer, window, folder)


def pair(source, split, student, teacher, length, folder):
  """The Paired of a Source's split and two tokenizers, its records in a file in `folder`."""
  path, tokens, size, documents, rows = pathlib.Path(folder, 'paired'), 0, 0, 0, 0
  with path.open('wb') as file:
    for pieces in chunks(source.documents(split), CHUNK):
      firsts, texts = zip(*pieces, strict=True)
      documents += sum(firsts)
      for text, *ends in zip(texts, *(read(t, texts) for t in (student, teacher)), strict=True):
        for row, end in cut(*ends, length, student.bos, teacher.bos):
          file.write(row.tobytes())
          rows, tokens = rows + 1, tokens + int(row['size'])
          size += len(text[end[0]:end[1]].encode())
  if not rows:
    raise InputError(f'{split!r} has no text of which both tokenizers make a row of {length} '
                     'tokens; give more text, or a longer window')
  records = np.memmap(path, record(length), 'r', shape=(rows,))
  facts = [source.fingerprint, split, student.fingerprint, teacher.fingerprint, length]
  key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
  return Paired(records['tokens'], tokens, size, documents, key, records)


def cut(student, teacher, length, bos, teacher_bos):
  """The rows of a text: yields (a record, (its first character, the one after its last)).

  A span that is longer than a row is left out.

  Args:
    student, teacher: (ids, ends) of the text: each token, and the character that it ends before,
      -1 where it ends within one.
    length: tokens a row.
    bos, teacher_bos: what rows begin with, or None.
  """
  heads = [[] if b is None else [b] for b in (bos, teacher_bos)]
  places = [dict(zip(ends, range(1, len(ends) + 1))) for _, ends in (student, teacher)]
  shared = [0, *sorted(e for e in places[0].keys() & places[1].keys() if e > 0)]
  for place in places:
    place.setdefault(0, 0)
  rooms, k = [length - len(head) for head in heads], 0
  fits = lambda a, b: all(p[shared[b]] - p[shared[a]] <= room for p, room in zip(places, rooms))
  while k < len(shared) - 1:
    end = k
    while end + 1 < len(shared) and fits(k, end + 1):
      end += 1
    if end > k:
      yield _row(student, teacher, heads, places, shared[k:end + 1], length), (
          shared[k], shared[end])
    k = max(end, k + 1)


def _row(student, teacher, heads, places, shared, length):
  out = np.zeros((), record(length))
  for side, (ids, _), head, place in zip(('', 'teacher_'), (student, teacher), heads, places):
    bounds = [place[e] for e in shared]
    spans = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    size = len(head) + len(spans)
    out[f'{side}tokens'][:size] = [*head, *ids[bounds[0]:bounds[-1]]]
    out[f'{side}spans'] = -1
    out[f'{side}spans'][len(head):size] = spans
    out[f'{side}size'] = size
  return out


def read(tokenizer, texts):
  """(ids, ends) of each text; a token that ends within a character has the end -1."""
  found = tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
  return [(e.ids, [end if after is None or after[0] >= end else -1 for (_, end), after in zip(
      e.offsets, [*e.offsets[1:], None])]) for e in found]
