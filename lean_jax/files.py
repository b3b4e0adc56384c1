"""Files and folders that are whole or absent, whatever kills the process that writes them."""
import contextlib
import errno
import fcntl
import glob
import os
import pathlib
import secrets
import shutil

from lean_jax.errors import InputError


@contextlib.contextmanager
def replace_folder(target, *, overwrite=False):
  """A new folder beside `target` that becomes `target` when the block ends without an error.

  After an error nothing of it is left and what was at `target` is untouched. What a killed process
  left is removed by the next call for the same target.

  Args:
    target: a path; its parents are made. An empty folder there counts as none.
    overwrite: whether what is there may be replaced.

  Raises:
    InputError: `target` is there and may not be replaced, or cannot be written, or the disk is
      full.
  """
  target = pathlib.Path(target).resolve()
  _put_back(target)
  if occupied(target) and not overwrite:
    raise InputError(f'{target} is there already; name another folder, or allow overwriting')
  with _beside(target) as new:
    new.mkdir()
    with _locked(new):
      yield new
      old = None
      if occupied(target):
        old = _name(target, 'old')
        target.rename(old)
      try:
        new.rename(target)
      except BaseException:
        if old is not None:
          old.rename(target)
        raise
  if old is not None:
    _remove(old)


@contextlib.contextmanager
def replacing(path):
  """A binary file, open for writing, that becomes `path` when the block ends without an error.

  At every moment `path` is the old file or the new one, whole; racing writers do not meet.

  Raises:
    InputError: it cannot be written, or the disk is full.
  """
  with replacing_path(path) as new, open(new, 'wb') as file:
    yield file


@contextlib.contextmanager
def replacing_path(path):
  """As `replacing`, but gives the path of the new file, empty: for what opens files by itself."""
  path = pathlib.Path(path).resolve()
  with _beside(path) as new:
    new.touch(exist_ok=False)
    with _locked(new):
      yield new
      with open(new, 'rb') as file:
        os.fsync(file.fileno())
      os.replace(new, path)


def write_text(path, text):
  """Writes a text file, UTF-8, as `replacing` does."""
  with replacing(path) as file:
    file.write(text.encode())


def occupied(target):
  """Whether there is anything but an empty folder at a path."""
  target = pathlib.Path(target)
  return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def no_space(error):
  """Whether an exception, or one that it came from, says that the disk is full."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if 'No space left' in str(error) or 'Disk quota exceeded' in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def full(path):
  """The InputError of a disk that is full."""
  return InputError(f'no space left on the disk of {path}: free some, or name a folder on another '
                    'disk; nothing half-written was kept')


@contextlib.contextmanager
def _beside(target):
  """A new name beside target, nothing of which remains after an error."""
  new = _name(target, 'new')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target)
    yield new
  except BaseException as e:
    _remove(new)
    if no_space(e):
      raise full(target) from e
    ours = {None, *map(str, (new, *target.parents))}   # an error of a write names no file
    if isinstance(e, OSError) and (e.filename and str(e.filename)) in ours:
      raise InputError(f'{target} cannot be written: {e.strerror}; name a place that can') from e
    raise


@contextlib.contextmanager
def _locked(path):
  """Holds a lock that ends with the process: what nobody holds, a killed process has left."""
  handle = os.open(path, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):                 # a file system without locks
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(handle)


def _name(target, kind):
  return target.with_name(f'.{target.name}.{kind}-{secrets.token_hex(4)}')


def _left(target, kind):
  """The temporaries of `target` that no process holds."""
  found = []
  for path in target.parent.glob(f'.{glob.escape(target.name)}.{kind}-*'):
    try:
      handle = os.open(path, os.O_RDONLY)
    except OSError:
      continue
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      found.append(path)
    except OSError:
      pass
    finally:
      os.close(handle)
  return found


def _clean(target):
  for path in _left(target, 'new') + (_left(target, 'old') if target.exists() else []):
    _remove(path)


def _put_back(target):
  """Undoes a replacement that was killed between its two renames."""
  old = _left(target, 'old')
  if old and not target.exists():
    old[0].rename(target)


def _remove(path):
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(OSError):
      path.unlink()
