"""Packing: documents joined into one stream of tokens and cut into windows, kept on disk."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from lean_jax import files
from lean_jax.data.documents import Source
from lean_jax.data.tokenizer import Tokenizer
from lean_jax.errors import InputError

# Raised with any change of the splits, the stream or the files, so that old caches are left alone.
FORMAT = 1

# Characters tokenized at a time: enough to keep all cores busy, little enough for any memory.
CHUNK = 1 << 21

# Characters of a document tokenized in one go. An encoding takes 200 bytes a character, so a longer
# document is cut at a line end, which moves a token or two there.
WHOLE = 1 << 22


class Rows:
  """Rows of ids of one length: `array` [n, length]. What `Batches` takes is one with `batch`."""
  array: np.ndarray

  def __len__(self):
    return len(self.array)

  @property
  def length(self) -> int:
    """Tokens a row."""
    return self.array.shape[1]

  @property
  def tokens(self) -> int:
    """Tokens in all rows, those that fill them up included."""
    return self.array.size


@dataclasses.dataclass(frozen=True, eq=False)
class Windows(Rows):
  """Packed windows of one length.

  Attributes:
    array: [n, length], uint16 or uint32, on disk.
    stream_tokens: tokens before the tail shorter than a window was dropped, BOS included.
    bytes: UTF-8 bytes of text that those cover. Bits per byte are the mean nats a token, times
      stream_tokens / bytes, over log 2.
    documents: that begin in the stream.
    fingerprint: of the corpus, the split, the tokenizer and the length.
  """
  array: np.ndarray
  stream_tokens: int
  bytes: int
  documents: int
  fingerprint: str

  def batch(self, rows) -> dict[str, np.ndarray]:
    """tokens: [rows, length], int32."""
    return dict(tokens=self.array[rows].astype(np.int32))


def pack(source: Source, split, tokenizer: Tokenizer, length, cache_dir, *, max_tokens=None,
         progress: Callable[[int, int, str], None] | None = None) -> Windows:
  """The windows of a split: documents in order, each after BOS where there is one, end to end.

  They are made once: the same content, tokenizer and length are found again in `cache_dir`.

  Args:
    split: 'train', 'validation', 'test', or None or 'all' for every document.
    length: tokens a window.
    cache_dir: a folder, made where there is none; any number of processes may share it.
    max_tokens: where the stream stops, if it gets there.
    progress: called with bytes tokenized, bytes in all and what is done.

  Raises:
    InputError: fewer tokens than a window, a full disk, or a document that cannot be used.
  """
  if length < 1 or (max_tokens is not None and max_tokens < length):
    raise InputError(f'windows of {length} tokens from {max_tokens or "all"} tokens; give a length '
                     'from 1 to max_tokens')
  length, split = int(length), split or 'all'
  documents = source.documents(split)
  facts = [FORMAT, source.fingerprint, split, tokenizer.fingerprint, length, max_tokens]
  key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
  path = pathlib.Path(cache_dir, f'{key}.tokens')
  dtype = np.dtype('<u2' if tokenizer.size <= 1 << 16 else '<u4')
  described = path.with_suffix('.json')
  counts = cached(path, described, length, dtype)
  if counts is None:
    total = sum(len(text.encode()) for _, text in source.documents(split)) if progress else 0

    def report(done):
      if progress:
        progress(done, total, f'packing {split}')

    with files.replacing(path) as file:
      counts = write(file, documents, tokenizer, dtype, max_tokens, report)
      if counts['stream_tokens'] < length:
        raise InputError(f"{split!r} has {counts['stream_tokens']} tokens, one window needs "
                         f'{length}; give more text or a shorter length')
      file.truncate(counts['stream_tokens'] // length * length * dtype.itemsize)
    with files.replacing(described) as file:
      file.write(json.dumps(counts).encode())
  array = np.memmap(path, dtype, 'r', shape=(counts['stream_tokens'] // length, length))
  return Windows(array, fingerprint=key, **counts)


def cached(path, described, length, dtype):
  """The counts written beside a file of windows, or None where either is absent or not whole."""
  try:
    counts = json.loads(described.read_bytes())
    counts = {name: counts[name] for name in ('stream_tokens', 'bytes', 'documents')}
    size = counts['stream_tokens'] // length * length * dtype.itemsize
    return counts if path.stat().st_size == size else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def write(file, documents, tokenizer, dtype, max_tokens, report):
  """Writes the stream of tokens and returns its counts."""
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  tokens = size = count = 0
  for pieces in chunks(documents, CHUNK if max_tokens is None else min(CHUNK, 8 * max_tokens)):
    firsts, texts = zip(*pieces, strict=True)
    for first, text, ids in zip(firsts, texts, tokenizer.encode_batch(texts), strict=True):
      head = bos if first else []
      room = len(head) + len(ids) if max_tokens is None else max_tokens - tokens
      if room <= 0:
        break
      ids = np.concatenate([np.array(head, np.int32), ids])
      size += len(text.encode()) if len(ids) <= room else tokenizer.bytes_of(text, room - len(head))
      file.write(ids[:room].astype(dtype).tobytes())
      tokens += min(len(ids), room)
      count += first
    report(size)
    if tokens == max_tokens:
      break
  return dict(stream_tokens=tokens, bytes=size, documents=count)


def chunks(documents, limit):
  """Yields lists of (begins a document, text) that reach `limit` characters, but for the last."""
  pieces, size = [], 0
  for _, document in documents:
    first, rest = True, document
    while first or rest:
      end = len(rest)
      if end > WHOLE:
        end = rest.rfind('\n', 0, WHOLE) + 1 or WHOLE
      pieces.append((first, rest[:end]))
      first, rest, size = False, rest[end:], size + end
      if size >= limit:
        yield pieces
        pieces, size = [], 0
  if pieces:
    yield pieces
