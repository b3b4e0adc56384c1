"""Files found and read."""
import os
import pathlib

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
