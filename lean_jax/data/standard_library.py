"""The text that ships with every Python: its library's code and its language reference."""

import ast
import dataclasses
import hashlib
import io
import pathlib
import sysconfig
import tokenize

from lean_jax.data import reading
from lean_jax.data.documents import Document, Source, split_of
from lean_jax.errors import InputError

# Installed packages are not the library, and pydoc_data is the other domain. Test trees are two
# thirds of the bytes where they exist, odd on purpose, and absent on Debian and in most images:
# with them the corpus would triple from one machine to the next.
WITHOUT = frozenset(('site-packages', 'dist-packages', '__pycache__', 'pydoc_data',
                     'test', 'tests', 'idle_test'))

# 65 character tables of 1.2 MB that differ in a few lines: in Python 3.11 they raise the share of
# held-out lines that are also training lines from 8 % to 26 %.
GENERATED = b'gencodec.py'


@dataclasses.dataclass(frozen=True)
class StandardLibrary(Source):
  """The running Python's own library, about 10 MB, or its reference, about 0.4 MB.

  Attributes:
    domain: 'code', one document a module, 90/5/5 by the hash of its path; or 'docs', one document
      a topic of the language reference, 80/10/10 by the hash of its name.
  """
  domain: str = 'code'

  def __post_init__(self):
    if self.domain not in ('code', 'docs'):
      raise InputError(f"no domain {self.domain!r} in the standard library; 'code' or 'docs'")

  def _documents(self, split):
    root = pathlib.Path(sysconfig.get_paths()['stdlib'])
    found, train, validation = ((modules(root), 90, 5) if self.domain == 'code' else
                                (topics(root), 80, 10))
    for document in found:
      if split is None or split_of(document.name, train, validation) == split:
        yield document


def modules(root):
  """Yields every module under a folder once, by path; copies and undecodable files are left out."""
  seen = set()
  names = reading.tree(root, '.py', WITHOUT)
  if not names:
    raise InputError(f'no Python modules in {str(root)!r}; use a Python that has its library '
                     'as files, or give a text corpus')
  for name in names:
    data = reading.read(root / name)
    digest = hashlib.blake2b(data).digest()
    # _sysconfigdata holds the paths and flags of the machine that built this Python.
    if digest in seen or GENERATED in data[:600] or '_sysconfigdata' in name:
      continue
    seen.add(digest)
    try:
      encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
      text = io.TextIOWrapper(io.BytesIO(data), encoding).read()
    except (SyntaxError, UnicodeDecodeError):
      continue
    yield Document(name, text)


def topics(root):
  """Yields the topics of the language reference by name, without those that others contain.

  The reference repeats itself: 'compound' holds 'if', 'while' and 'try' word for word. Largest
  first, a topic more than half of whose paragraphs were seen is left out, or validation would be
  read from training.
  """
  path = root / 'pydoc_data' / 'topics.py'
  if not path.is_file():
    raise InputError(f"this Python has no {str(path)!r}; use one that has it, or domain='code'")
  try:
    # Read, never run: the file is one assignment of a dict of strings.
    assigned, = (node.value for node in ast.parse(reading.read(path)).body
                 if isinstance(node, ast.Assign))
    texts = {str(name): str(text) for name, text in ast.literal_eval(assigned).items()}
  except (SyntaxError, ValueError, AttributeError) as error:
    raise InputError(f'{str(path)!r} is not one dict of topics; reinstall this Python') from error
  kept, seen = {}, set()
  for name, text in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])):
    paragraphs = {part.strip() for part in text.split('\n\n') if len(part.strip()) > 40}
    if 2 * sum(map(len, paragraphs & seen)) <= sum(map(len, paragraphs)):
      kept[name] = text
      seen |= paragraphs
  for name in sorted(kept):
    yield Document(f'pydoc_data/topics.py:{name}', kept[name])
