"""Every kind of source, and the one function that picks one by its path."""

import pathlib

from lean_jax.data.documents import SPLITS, Document, Source
from lean_jax.data.reading import tree
from lean_jax.data.standard_library import StandardLibrary
from lean_jax.data.text import JsonLines, TextFiles, existing
from lean_jax.data.tfds import Tfds
from lean_jax.errors import InputError

__all__ = ('SPLITS', 'Document', 'JsonLines', 'Source', 'StandardLibrary', 'TextFiles', 'Tfds',
           'open_source')

KINDS = ('auto', 'stdlib', 'text', 'jsonl', 'tfds')


def open_source(path='', kind='auto', field='text', data_dir=None) -> Source:
  """The source at a path, found to hold text.

  Args:
    path: '' or 'stdlib' for the standard library's code, 'stdlib:docs' for its reference,
      'tfds:NAME' for TensorFlow Datasets, else a file or folder: .jsonl, .json and a folder with
      .jsonl in it hold a document a line, anything else is text.
    kind: 'stdlib', 'text', 'jsonl' or 'tfds' instead of that choice.
    field: the key of the text, for JSON and TFDS.
    data_dir: of TFDS.

  Raises:
    InputError: no such kind or path, no text in it, or a first document that cannot be used.
  """
  path = str(path)
  if kind not in KINDS:
    raise InputError(f"no kind of source {kind!r}; there are: {', '.join(KINDS)}")
  if kind == 'auto':
    kind = guessed(path)
  if kind == 'stdlib':
    source = StandardLibrary(path.removeprefix('stdlib').removeprefix(':') or 'code')
  elif kind == 'tfds':
    source = Tfds(path.removeprefix('tfds:'), data_dir, field)
  else:
    source = JsonLines(path, field) if kind == 'jsonl' else TextFiles(path)
  if not any(document.text.strip() for document in source.documents()):
    raise InputError(f'no text in {path!r}; give a source with at least one document')
  return source


def guessed(path):
  """The kind of source that a path names."""
  if path in ('', 'stdlib') or path.startswith('stdlib:'):
    return 'stdlib'
  if path.startswith('tfds:'):
    return 'tfds'
  existing(path)
  lines = path.endswith(('.jsonl', '.json')) or tree(pathlib.Path(path), '.jsonl')
  return 'jsonl' if lines else 'text'
