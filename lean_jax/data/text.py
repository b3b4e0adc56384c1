"""Corpora in text files and in JSON lines."""

import dataclasses
import itertools
import json
import pathlib
import re

from lean_jax.data import reading
from lean_jax.data.documents import SPLITS, Document, Source, split_of
from lean_jax.errors import InputError

# From this many files on, a file belongs to one split; below, each file is cut in three.
FILES = 20


@dataclasses.dataclass(frozen=True)
class TextFiles(Source):
  """A UTF-8 text file, or the text files of a folder by path; its binary files are left out.

  From 20 files on each belongs to one split, 90/5/5 by the hash of its path. Fewer are cut: the
  first 90 % of a file's bytes train, the next 5 % validate, the last 5 % test.
  """
  path: str

  def __post_init__(self):
    existing(self.path)

  def _documents(self, split):
    texts = self._texts()
    first = list(itertools.islice(texts, FILES))
    for name, text in itertools.chain(first, texts):
      if split is None or len(first) == FILES:
        if split in (None, split_of(name)):
          yield Document(name, text)
      elif part := cut(text)[SPLITS.index(split)]:
        yield Document(f'{name}:{split}', part)

  def _texts(self):
    root = pathlib.Path(self.path)
    if not root.is_dir():
      yield root.name, decoded(root)
      return
    for name in reading.tree(root):
      try:
        yield name, decoded(root / name)
      except UnicodeInputError:
        continue


@dataclasses.dataclass(frozen=True)
class JsonLines(Source):
  """A document a line of a .jsonl file, or of every .jsonl file of a folder by path.

  A .json file that is one list of objects will do too. Blank lines are left out. Splits are
  90/5/5 by the hash of the document's index.

  Attributes:
    path: of the file or folder.
    field: the key of the text.
  """
  path: str
  field: str = 'text'

  def __post_init__(self):
    existing(self.path)

  def _documents(self, split):
    for index, (name, where, record) in enumerate(self.records()):
      if split in (None, split_of(str(index))):
        yield Document(name, self._text(record, where))

  def records(self):
    """Yields the name, the place and the value of each record."""
    root = pathlib.Path(self.path)
    names = reading.tree(root, '.jsonl') if root.is_dir() else ['']
    if not names:
      raise InputError(f'no .jsonl files in {self.path!r}; give a folder that has some, or a file')
    for name in names:
      path = root / name
      if path.suffix == '.json':
        lines = enumerate(listed(path))
      else:
        lines = enumerate(reading.lines(path), 1)
      for number, line in lines:
        where = f'{path}:{number}'
        if isinstance(line, bytes):
          if not line.strip():
            continue
          line = parsed(line, where)
        yield f'{name or path.name}:{number}', where, line

  def _text(self, record, where):
    if not isinstance(record, dict):
      raise InputError(f'{where}: a {type(record).__name__}, not an object; give objects with '
                       f'a field {self.field!r}')
    if self.field not in record:
      raise InputError(f'{where}: no field {self.field!r}; choose one of: '
                       f'{", ".join(map(repr, record))}')
    text = record[self.field]
    if not isinstance(text, str):
      raise InputError(f'{where}: field {self.field!r} is a {type(text).__name__}, not a string; '
                       'choose a field of text')
    check_whole(text, self.field, where)
    return text


def check_whole(text, field, where):
  """Raises InputError for a text that has half of a character."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(f'{where}: field {field!r} has half a surrogate pair at character '
                     f'{error.start}; repair the line') from error


class UnicodeInputError(InputError):
  """A file that is not UTF-8 text."""


def existing(path):
  """Raises InputError where there is no such file or folder."""
  if not str(path) or not pathlib.Path(path).exists():
    raise InputError(f'no file or folder {str(path)!r}; give the path of one that exists')


def decoded(path):
  """The text of a UTF-8 file without its byte order mark; a NUL byte makes a file binary."""
  data = reading.read(path)
  try:
    text, at = data.decode('utf-8-sig'), data.find(0)
  except UnicodeDecodeError as error:
    at = error.start
  if at >= 0:
    raise UnicodeInputError(f'{str(path)!r} is not UTF-8 text from byte {at} on; convert it, '
                            'for example with iconv -t UTF-8')
  return text


def parsed(data, where):
  """The value of JSON bytes."""
  try:
    return json.loads(data.decode('utf-8-sig'))
  except (ValueError, RecursionError) as error:
    raise InputError(f'{where}: not JSON ({error}); repair or remove the line') from error


def listed(path):
  """The list in a .json file."""
  value = parsed(reading.read(path), path)
  if not isinstance(value, list):
    raise InputError(f'{str(path)!r} holds a {type(value).__name__}, not a list; give a list of '
                     'objects, or .jsonl with an object a line')
  return value


def cut(text):
  """The first 90, the next 5 and the last 5 % of a text's bytes.

  It is cut at the nearest blank line if that is within 2 % of its size, else at a line, a space
  or a character, whichever is the first to leave no part empty.
  """
  data = text.encode()
  size, tail = len(data), len(data) * 4 // 5
  for mark, slack in ((rb'\n\s*\n', .02), (rb'\n', .05), (rb'\s', .05), (rb'(?=[^\x80-\xbf])', 1)):
    ends = [tail + found.end() for found in re.finditer(mark, data[tail:])]
    if not ends:
      continue
    first, second = (min(ends, key=lambda end: abs(end - share * size)) for share in (.9, .95))
    off = max(abs(first - .9 * size), abs(second - .95 * size))
    if 0 < first < second < size and off <= slack * size:
      return data[:first].decode(), data[first:second].decode(), data[second:].decode()
  return text, '', ''
