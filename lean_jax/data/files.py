"""Files, read and written whole or not at all."""

import contextlib
import errno
import os
import pathlib
import secrets

from lean_jax.errors import InputError


def tree(root, suffix='', without=frozenset()):
  """Relative posix paths of the files under a folder whose names end in `suffix`, sorted.

  Hidden names, linked folders and folders named in `without` are left out.
  """
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name[0] != '.' and name not in without]
    paths = [pathlib.Path(folder, name) for name in names if name[0] != '.']
    found += [path.relative_to(root).as_posix() for path in paths
              if path.name.endswith(suffix) and path.is_file()]
  return sorted(found)


def read(path):
  """The bytes of a file; raises InputError where they cannot be read."""
  try:
    return pathlib.Path(path).read_bytes()
  except OSError as error:
    raise unreadable(path, error) from error


def unreadable(path, error):
  """The InputError of a file that an OSError says cannot be read."""
  return InputError(f'cannot read {str(path)!r}: {error.strerror}; give a readable file')


def lines(path):
  """Yields the lines of a file as bytes; raises InputError where they cannot be read."""
  try:
    with open(path, 'rb') as file:
      yield from file
  except OSError as error:
    raise unreadable(path, error) from error


@contextlib.contextmanager
def replacing(path):
  """A binary file, open for writing, that becomes `path` when the block ends without an error.

  It is written beside `path` and renamed, so that readers and racing writers see a whole file;
  after an error nothing is left behind.

  Raises:
    InputError: the folder cannot be made or written, or its disk is full.
  """
  path = pathlib.Path(path)
  partial = path.with_name(f'.{path.name}.{secrets.token_hex(4)}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, 'xb') as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    if not isinstance(error, OSError):
      raise
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = 'its disk is full; free space' if full else f'{error.strerror}; make it writable'
    raise InputError(f'cannot write in {str(path.parent)!r}: {reason} or give another folder'
                     ) from error
