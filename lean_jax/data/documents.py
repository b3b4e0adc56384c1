"""A corpus as named documents in three disjoint splits."""

import abc
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from lean_jax.errors import InputError

SPLITS = ('train', 'validation', 'test')


class Document(NamedTuple):
  """A text and the name it has within its source."""
  name: str
  text: str


class Source(abc.ABC):
  """Documents in a fixed order; the same content gives the same documents on every machine."""

  def documents(self, split=None) -> Iterator[Document]:
    """The documents of a split in order; None or 'all' gives every document, whole.

    Raises:
      InputError: no such split, or, while reading, a document that cannot be used.
    """
    if split in (None, 'all'):
      return self._documents(None)
    if split not in SPLITS:
      raise InputError(f"no split {split!r}; there are {', '.join(SPLITS)} and all")
    return self._documents(split)

  @abc.abstractmethod
  def _documents(self, split):
    """Yields the documents of one of `SPLITS`, or all of them for None."""

  @property
  def fingerprint(self) -> str:
    """A hash of the kind of source and of every name and text; reads the whole source."""
    digest = hashlib.blake2b(type(self).__name__.encode(), digest_size=16)
    for document in self.documents():
      for part in document:
        data = part.encode()
        digest.update(len(data).to_bytes(8, 'little') + data)
    return digest.hexdigest()


def split_of(name, train=90, validation=5):
  """The split that a name falls in by its hash, at these percentages; the rest is 'test'."""
  number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), 'big') % 100
  return SPLITS[(number >= train) + (number >= train + validation)]
