"""Models on disk: of a run that goes on, and finished ones.

Whatever is read is proved to be what was written: its description is compared (a cast or another
kind of weight is an error), and the digest of every array. Flipped bits inside an array load
without a word otherwise.
"""
import contextlib
import json
import pathlib
import shutil
import time
import warnings

import jax
import orbax.checkpoint as ocp

from lean_jax import files
from lean_jax.errors import InputError
from lean_jax.training import hosts, stored
from lean_jax.training.digest import digest
from lean_jax.tree import named_arrays
from lean_jax.weights.description import abstract, describe, difference
from lean_jax.weights.prepared import refuse_prepared

_UNFINISHED = '*.orbax-checkpoint-tmp*'


class Checkpoints:
  """The states of a training run, newest last, saved while it goes on.

  On several hosts all make one of the same folder, which all see, and call its methods alike; each
  writes and reads its own parts of arrays.
  """

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
    self._quiet = contextlib.ExitStack()               # open as long as the manager
    self._errors = []                                  # of its threads
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
    refuse_prepared(params)
    trees = dict(params=named_arrays(params), opt=named_arrays(opt))
    document = stored.seal(dict(
        step=step, meta=meta, params=describe(params), opt=describe(trees['opt']),
        digests={item: digest(tree) for item, tree in trees.items()}))
    items = {item: ocp.args.StandardSave(tree) for item, tree in trees.items() if tree}
    self._check_alone()
    with self._told():
      self._agree_on_the_one_before()
      self._writer().save(step, force=True, args=ocp.args.Composite(
          meta=ocp.args.JsonSave(document), **items))
    self._at = step
    return True

  def latest(self):
    """The newest step on disk, or None; damaged or not."""
    return max(hosts.of_first(self._steps()), default=None)

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
    steps = hosts.of_first(self._steps())
    if step is not None and step not in steps:
      raise InputError(f'no checkpoint of step {step} in {self.folder}; there are: {steps}')
    wrong = {}
    for s in reversed(steps) if step is None else [step]:
      try:
        found = self._read(s, params_like, opt_like)
      except stored.Damaged as e:
        wrong[s] = f'step {s}: {e}'
        continue
      if wrong and hosts.first():
        self._warn(f'passed over damaged checkpoints in {self.folder}, to be removed by the next '
                   f'save: {"; ".join(wrong.values())}; went back to step {s}')
      self._at, self._damaged = s, tuple(wrong)
      return s, *found
    raise InputError(f'no checkpoint in {self.folder} can be used: '
                     f'{"; ".join(wrong.values()) or "it has none"}; start in another folder')

  def wait(self):
    """Returns once everything is on disk; raises InputError if the disk is full."""
    if self._manager is not None:
      with self._told():
        self._agree_on_the_one_before()
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
    document = stored.unseal_on_all(folder / 'meta' / 'metadata')
    expected = dict(params=describe(params_like), opt=describe(named_arrays(opt_like)))
    for item, like in expected.items():
      wrong = difference(document[item], json.loads(json.dumps(like)))
      if wrong:
        raise InputError(f'{folder}/{item} was saved from another model or optimizer: {wrong}; '
                         'nothing is ever cast: use the settings of that run, or another folder')
    trees = [stored.read_tree(folder / item, like, document['digests'][item])
             for item, like in dict(params=params_like, opt=opt_like).items()]
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
    self._errors = []
    self._quiet.enter_context(stored.unheard(self._errors))
    self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(self.keep)))
    return self._manager

  def _agree_on_the_one_before(self):
    """Waits for the save under way, on several hosts; an error of one is an error of all.

    The host whose thread fails, and the threads of the others, wait for each other at different
    barriers of Orbax, for ten minutes; so all hear of it here, and part.
    """
    while hosts.several() and self._manager is not None:
      # Of this moment: as soon as hosts part, threads that wait for another one fail too.
      own = min(self._errors, key=_waited, default=None)
      error = f'{type(own).__name__}: {own}' if own else None
      said = hosts.of_all([self._manager.is_saving_in_progress(), error, _waited(own)])
      failed = [(waited, f'host {k}: {error}')
                for k, (_, error, waited) in enumerate(said) if error]
      if failed:
        hosts.part()
        waited, first = min(failed)
        raise own if own and _waited(own) == waited else InputError(
            f'{self.folder} cannot be written by {first}')
      if not any(saving for saving, *_ in said):
        return
      time.sleep(.1)

  def _discard(self):
    manager, self._manager = self._manager, None
    if manager is not None:
      with contextlib.suppress(Exception):             # raised before, and told
        manager.close()
    self._quiet.close()

  def _remove(self, *patterns):
    if hosts.first():
      for path in (p for pattern in patterns for p in self.folder.glob(pattern)):
        shutil.rmtree(path, ignore_errors=True)

  @contextlib.contextmanager
  def _told(self):
    """Tells in a line of a disk that cannot be written; after any error a save starts anew."""
    try:
      yield
    except Exception as e:
      self._discard()
      self._remove(_UNFINISHED)
      self._at = max(self._steps(), default=-1)
      if isinstance(e, InputError):                    # told already
        raise
      if files.no_space(e):
        raise files.full(self.folder) from e
      if isinstance(e, OSError):
        said = e.strerror or f'{type(e).__name__}: {e}'
        raise InputError(f'{self.folder} cannot be written: {said}; name a place that can') from e
      raise


def save_model(folder, params, meta, *, overwrite=False, beside=lambda new: None):
  """Writes a finished model: its arrays, and `lean.json`, which says what they are.

  Args:
    folder: whole or untouched, whatever happens.
    params: tree of weights and arrays, all of them on this host's devices; or spread over several
      hosts, and then all of these call this, and each writes its parts.
    meta: anything that JSON holds.
    overwrite: whether a model that is there may be replaced; anything else never is.
    beside: called with the new folder before it is in its place, to write what else belongs there.

  Raises:
    InputError: the folder is there, or the disk is full.
  """
  refuse_prepared(params)
  folder = pathlib.Path(folder).resolve()
  arrays = named_arrays(params)
  if overwrite and files.occupied(folder) and not _card(folder).exists():
    raise InputError(f'{folder} holds no model of lean_jax, so it is not overwritten; name another')
  spread = stored.spread(params)
  digests = digest(params)
  with _new_folder(folder, overwrite, spread) as new, stored.unheard():
    with ocp.StandardCheckpointer(**{} if spread else stored.alone()) as checkpointer:
      # A process alone among several saves what is NumPy's.
      own = arrays if spread or not hosts.several() else jax.device_get(arrays)
      checkpointer.save(new / 'params', own)
    if hosts.first() or not spread:
      document = stored.seal(dict(meta=meta, params=describe(params), digests=digests))
      files.write_text(_card(new), json.dumps(document, indent=1))
      beside(new)


@contextlib.contextmanager
def _new_folder(folder, overwrite, spread):
  """`files.replace_folder`, one for all hosts if arrays are spread over them."""
  if not spread:
    with files.replace_folder(folder, overwrite=overwrite) as new:
      yield new
    return
  with contextlib.ExitStack() as stack:
    new = error = None
    if hosts.first():
      try:
        new = str(stack.enter_context(files.replace_folder(folder, overwrite=overwrite)))
      except InputError as e:
        error = str(e)
    new, error = hosts.of_first((new, error))
    if error:
      raise InputError(error)
    yield pathlib.Path(new)
  hosts.barrier('the model is in its place')


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
    return stored.read_tree(path, like, document['digests']), document['meta']
  except stored.Damaged as e:
    raise InputError(f'{folder} is damaged: {e}; copy or make it again') from e


def read_card(folder):
  """What `lean.json` of a finished model says: version, meta, params (described), digests."""
  path = _card(pathlib.Path(folder))
  if not path.is_file():
    raise InputError(f'{folder} holds no model: lean.json is not there; give a folder that '
                     'save_model wrote')
  try:
    return stored.unseal(path)
  except stored.Damaged as e:
    raise InputError(f'{folder} is damaged: {e}; copy or make it again') from e


def _waited(error):
  """Whether an error is that of having waited for what failed elsewhere."""
  return isinstance(error, TimeoutError)


def _card(folder):
  return folder / 'lean.json'
