"""Models on disk: of a run that goes on, and finished ones.

Whatever is read is proved to be what was written: its description is compared (a cast or another
kind of weight is an error), and the digest of every array. Flipped bits inside an array load
without a word otherwise.
"""
import contextlib
import gc
import hashlib
import json
import pathlib
import shutil
import sys
import warnings

import jax
import orbax.checkpoint as ocp

from lean_jax.errors import InputError
from lean_jax.train import files
from lean_jax.train.digest import digest
from lean_jax.tree import name, named_arrays
from lean_jax.weights.description import abstract, describe, difference

VERSION = 1
_UNFINISHED = '*.orbax-checkpoint-tmp*'


class _Damaged(InputError):
  """What was written cannot be read back."""


class Checkpoints:
  """The states of a training run, newest last, saved while it goes on."""

  def __init__(self, folder, *, every, keep=2, warn=warnings.warn):
    """Writes nothing yet.

    Args:
      folder: of this run alone; made by the first save.
      every: steps between saves.
      keep: newest checkpoints that stay.
      warn: called with a sentence when a damaged checkpoint is passed over.
    """
    if every < 1 or keep < 1:
      raise InputError(f'checkpoints every {every} steps, the newest {keep} kept; expected at '
                       'least 1 of both')
    self.folder, self.every, self.keep = pathlib.Path(folder).resolve(), every, keep
    self._warn = warn
    self._manager = None                               # made by the first save
    self._at = -1                                      # the step last saved or restored
    self._damaged = ()

  def save(self, step, params, opt, meta, *, force=False):
    """Starts to save a state; the caller may donate its arrays as soon as this returns.

    Args:
      step: steps done.
      params: tree of weights and arrays, with None where another tree has the array.
      opt: any pytree of arrays.
      meta: what else the run needs; anything that JSON holds.
      force: save although `every` does not divide step.

    Returns:
      Whether it is saved; False between the intervals, and for a step saved or restored already.

    Raises:
      InputError: the disk is full, now or during the save before; or the folder has checkpoints
        of another run.
    """
    if step == self._at or (step % self.every and not force):
      return False
    trees = dict(params=named_arrays(params), opt=named_arrays(opt))
    document = _seal(dict(
        version=VERSION, step=step, meta=meta, params=describe(params), opt=describe(trees['opt']),
        digests={item: digest(tree) for item, tree in trees.items()}))
    items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items() if tree}
    self._check_alone()
    with self._full_disk():
      self._writer().save(step, force=True, args=ocp.args.Composite(
          meta=ocp.args.JsonSave(document), **items))
    self._at = step
    return True

  def latest(self):
    """The newest step on disk, or None; damaged or not."""
    return max(self._steps(), default=None)

  def restore(self, params_like, opt_like, *, step=None):
    """A state, with the digest of every array verified.

    Args:
      params_like, opt_like: trees of arrays or of ShapeDtypeStructs, with the wanted shardings.
      step: the newest one that is not damaged if None.

    Returns:
      (step, params, opt, meta).

    Raises:
      InputError: the checkpoint is of other shapes, dtypes or kinds of weights; or it is damaged,
        and if step is None all of them are.
    """
    self.close()
    steps = self._steps()
    if step is not None and step not in steps:
      raise InputError(f'no checkpoint of step {step} in {self.folder}; there are: {steps}')
    wrong = {}
    for s in reversed(steps) if step is None else [step]:
      try:
        found = self._read(s, params_like, opt_like)
      except _Damaged as e:
        wrong[s] = f'step {s}: {e}'
        continue
      if wrong:
        self._warn(f'passed over damaged checkpoints in {self.folder}, to be removed by the next '
                   f'save: {"; ".join(wrong.values())}; went back to step {s}')
      self._at, self._damaged = s, tuple(wrong)
      return s, *found
    raise InputError(f'no checkpoint in {self.folder} can be used: '
                     f'{"; ".join(wrong.values()) or "it has none"}; start in another folder')

  def wait(self):
    """Returns once everything is on disk; raises InputError if the disk is full."""
    if self._manager is not None:
      with self._full_disk():
        self._manager.wait_until_finished()

  def close(self):
    """Waits, and ends the threads; a later save or restore starts them again."""
    self.wait()
    self._discard()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if kind is None:
      self.close()
    else:
      with contextlib.suppress(InputError):            # the error under way says more
        self.close()

  def _steps(self):
    """Steps on disk, in order. A save under way, or killed, has a name with a suffix."""
    if not self.folder.is_dir():
      return []
    return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal() and p.is_dir())

  def _read(self, step, params_like, opt_like):
    folder = self.folder / str(step)
    document = _read_meta(folder / 'meta')
    likes = dict(params=params_like, opt=opt_like)
    expected = dict(params=describe(params_like), opt=describe(named_arrays(opt_like)))
    for item, like in expected.items():
      where = f'{self.folder}, step {step}, {item}'
      _same(document[item], json.loads(json.dumps(like)), where)
    trees = [_read_tree(folder / item, like, document['digests'][item])
             for item, like in likes.items()]
    return *trees, document['meta']

  def _check_alone(self):
    later = [s for s in self._steps() if s > self._at and s not in self._damaged]
    if later and self._manager is None:
      raise InputError(f'{self.folder} has checkpoints of steps {later} that this run did not '
                       'restore; name a new folder, or remove them')

  def _writer(self):
    """The manager, with what killed processes left and what is damaged out of its way."""
    if self._manager is not None:
      return self._manager
    self._remove(*(str(s) for s in self._damaged), _UNFINISHED)
    self._damaged = ()
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(self.keep)))
    return self._manager

  def _discard(self):
    manager, self._manager = self._manager, None
    if manager is not None:
      with contextlib.suppress(Exception):             # raised before, and told
        manager.close()

  def _remove(self, *patterns):
    if jax.process_index() == 0:
      for path in (p for pattern in patterns for p in self.folder.glob(pattern)):
        shutil.rmtree(path, ignore_errors=True)

  @contextlib.contextmanager
  def _full_disk(self):
    """Says in one line that the disk is full; after any error, the next save starts afresh."""
    try:
      yield
    except Exception as e:
      self._discard()
      self._remove(_UNFINISHED)
      self._at = max(self._steps(), default=-1)
      if files.no_space(e):
        raise files.full(self.folder) from e
      raise


def save_model(folder, params, meta, *, overwrite=False):
  """Writes a finished model: its arrays, and `lean.json`, which says what they are.

  Args:
    folder: whole or untouched, whatever happens.
    params: tree of weights and arrays, all of them on this host's devices.
    meta: anything that JSON holds.
    overwrite: whether a model that is there may be replaced; anything else never is.

  Raises:
    InputError: the folder is there, or the disk is full.
  """
  folder = pathlib.Path(folder).resolve()
  if overwrite and folder.exists() and any(folder.iterdir()) and not _card(folder).exists():
    raise InputError(f'{folder} holds no model of lean_jax, so it is not overwritten; name another')
  arrays = named_arrays(params)
  document = _seal(dict(version=VERSION, meta=meta, params=describe(params),
                        digests=digest(params)))
  with files.replace_folder(folder, overwrite=overwrite) as new:
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(new / 'params', arrays)
    files.write_text(_card(new), json.dumps(document, indent=1))


def load_model(folder, *, shardings=None):
  """A finished model, with the digest of every array verified.

  Args:
    folder: of `save_model`.
    shardings: one for all arrays, a tree of them, or a function from the tree of
      ShapeDtypeStructs to such a tree; the first device if None.

  Returns:
    (params, meta).

  Raises:
    InputError: the folder holds no model, or a damaged one, or one of a newer version.
  """
  document = read_card(folder)
  like = abstract(document['params'])
  where = shardings(like) if callable(shardings) else shardings
  if where is not None:
    like = jax.tree.map(lambda s, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        jax.tree.broadcast(where, like), like)
  path = pathlib.Path(folder).resolve() / 'params'
  try:
    return _read_tree(path, like, document['digests']), document['meta']
  except _Damaged as e:
    raise InputError(f'{folder} is damaged: {e}; copy or make it again') from e


def read_card(folder):
  """What `lean.json` of a finished model says: version, meta, params (described), digests."""
  path = _card(pathlib.Path(folder))
  if not path.is_file():
    raise InputError(f'{folder} holds no model: lean.json is not there; give a folder that '
                     'save_model wrote')
  try:
    return _unseal(path.read_text(encoding='utf-8'))
  except (_Damaged, OSError, UnicodeDecodeError) as e:
    raise InputError(f'{path} is damaged: {_line(e)}; copy or make the model again') from e


def _card(folder):
  return folder / 'lean.json'


def _seal(document):
  """The document with the digest of its own text."""
  return document | dict(sha256=_checksum(document))


def _checksum(document):
  return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _unseal(text):
  try:
    document = json.loads(text)
  except ValueError as e:
    raise _Damaged(f'no JSON ({e})') from e
  if not isinstance(document, dict) or document.pop('sha256', None) != _checksum(document):
    raise _Damaged('its text was changed')
  if document['version'] != VERSION:
    raise InputError(f'written in version {document["version"]} of the format, this lean_jax reads '
                     f'{VERSION}; update lean_jax')
  return document


def _read_meta(folder):
  try:
    text = (folder / 'metadata').read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise _Damaged(f'meta: {_line(e)}') from e
  return _unseal(text)


def _same(found, expected, where):
  wrong = difference(found, expected)
  if wrong:
    raise InputError(f'{where} was saved from another model or optimizer: {wrong}; nothing is '
                     'ever cast: use the settings that it was made with, or another folder')


def _read_tree(folder, like, digests):
  """The tree of `like`, from the arrays in folder.

  Raises:
    _Damaged: an array is missing, of another shape or dtype, or not what was saved.
  """
  target = {n: _target(x) for n, x in named_arrays(like).items()}
  if not target:
    return like
  arrays, wrong = _quietly(lambda: _read_arrays(folder, target))
  if wrong:
    raise _Damaged(f'{folder.name}: {wrong}')
  changed = [n for n, d in digest(arrays).items() if d != digests.get(n)]
  if changed:
    raise _Damaged(f'{changed[0]} is not what was saved' + (
        f', nor are {len(changed) - 1} others' if changed[1:] else ''))
  return jax.tree_util.tree_map_with_path(lambda path, _: arrays[name(path)], like)


def _read_arrays(folder, target):
  stored = ocp.StandardCheckpointHandler().metadata(folder).tree
  for n, x in target.items():
    kind = 'uint32' if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else str(x.dtype)
    shape = tuple(stored[n].shape)
    if str(stored[n].dtype) != kind or shape[:len(x.shape)] != x.shape:
      raise _Damaged(f'{n} is stored as {stored[n].dtype} {shape}, expected {kind} {x.shape}')
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(folder, target)


def _quietly(read):
  """(what `read` returns, None), or (None, what was wrong).

  After one damaged array Orbax abandons the coroutines of the others, and each prints a page as it
  dies: they die in here, unheard.
  """
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    try:
      return read(), None
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as e:                             # whatever a parser of damaged files meets
      wrong = _line(e)
    gc.collect()
    return None, wrong
  finally:
    sys.unraisablehook = hook


def _target(x):
  sharding = getattr(x, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding.shard_shape(tuple(x.shape))                 # raises if it does not divide
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _line(error):
  if isinstance(error, _Damaged):
    return str(error)
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:150]}'
