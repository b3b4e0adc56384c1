"""Arrays and documents on disk, proved to be what was written when they are read."""
import asyncio
import contextlib
import hashlib
import json
import logging

import jax
import orbax.checkpoint as ocp

from lean_jax.errors import InputError
from lean_jax.training import hosts
from lean_jax.training.digest import digest
from lean_jax.tree import name, named_arrays

VERSION = 1


class Damaged(InputError):
  """What was written cannot be read back."""


def seal(document):
  """A JSON-able dictionary with the version of the format and the digest of its own text."""
  document = json.loads(json.dumps(dict(version=VERSION) | document))
  return document | dict(sha256=_checksum(document))


def unseal(path):
  """The dictionary that `seal` made, read from a JSON file.

  Raises:
    Damaged: the file is missing, or a byte of it was changed.
    InputError: it is whole, but of another version of the format.
  """
  try:
    document = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError) as e:                   # bad UTF-8 and bad JSON are ValueErrors
    raise Damaged(f'{path.name}: {_line(e)}') from e
  if not isinstance(document, dict) or document.pop('sha256', None) != _checksum(document):
    raise Damaged(f'{path.name}: its text was changed')
  if document['version'] != VERSION:
    raise InputError(f'{path} is in version {document["version"]} of the format, this lean_jax '
                     f'reads {VERSION}; update lean_jax')
  return document


def unseal_on_all(path):
  """`unseal` on every host: what is damaged for one is so for all."""
  document = wrong = None
  try:
    document = unseal(path)
  except Damaged as e:
    wrong = str(e)
  wrong = hosts.of_any(wrong)
  if wrong:
    raise Damaged(wrong)
  return document


def spread(tree):
  """Whether an array of a tree is on devices of several hosts."""
  return any(not s.is_fully_addressable for x in jax.tree.leaves(tree)
             if (s := getattr(x, 'sharding', None)) is not None)


def alone():
  """Settings of an Orbax checkpointer of which this process waits for no other."""
  me = jax.process_index()
  return dict(multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'host{me}')
  ) if hosts.several() else {}


def read_tree(folder, like, digests):
  """The tree of `like`, from the arrays that Orbax saved in a folder under their names.

  Args:
    folder: absolute path.
    like: tree of arrays or ShapeDtypeStructs; without a sharding, the first device.
    digests: {name: digest} of all arrays.

  Raises:
    Damaged: an array is missing, of another shape or dtype, or not what was saved.
  """
  target = {n: _target(x) for n, x in named_arrays(like).items()}
  if not target:
    return like
  arrays, wrong = _attempt(lambda: _read_arrays(folder, target))
  if spread(target):
    wrong = hosts.of_any(wrong)                        # or some would go on, and wait for ever
  if wrong:
    raise Damaged(f'{folder.name}: {wrong}')
  changed = [n for n, d in digest(arrays).items() if d != digests.get(n)]
  if changed:
    more = f', nor are {len(changed) - 1} others' if changed[1:] else ''
    raise Damaged(f'{folder.name}: {changed[0]} is not what was saved{more}')
  return jax.tree_util.tree_map_with_path(lambda path, _: arrays[name(path)], like)


@contextlib.contextmanager
def unheard(errors=None):
  """Inside, Orbax does not log: pages about errors that it also raises, told here in a line.

  Args:
    errors: None, or a list that is given those errors, in whatever thread they were met.
  """
  def keep(record):
    ours = 'orbax' not in record.pathname
    if not ours and errors is not None and record.exc_info and record.exc_info[1] is not None:
      errors.append(record.exc_info[1])
    return ours
  logger = logging.getLogger('absl')
  logger.addFilter(keep)
  try:
    yield
  finally:
    logger.removeFilter(keep)


def _checksum(document):
  return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _target(x):
  sharding = getattr(x, 'sharding', None)
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  sharding.shard_shape(tuple(x.shape))                 # raises if it does not divide
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _read_arrays(folder, target):
  found = ocp.StandardCheckpointHandler().metadata(folder).tree
  for n, x in target.items():
    kind = 'uint32' if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else str(x.dtype)
    shape = tuple(found[n].shape)
    if str(found[n].dtype) != kind or shape[:len(x.shape)] != x.shape:
      raise Damaged(f'{n} is stored as {found[n].dtype} {shape}, expected {kind} {x.shape}')
  with ocp.StandardCheckpointer(**alone()) as checkpointer:
    return checkpointer.restore(folder, target)


def _attempt(read):
  """(what `read` returns, None), or (None, what was wrong)."""
  new_loop, asyncio.new_event_loop = asyncio.new_event_loop, _PatientLoop
  try:
    with unheard():
      return read(), None
  except (MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as e:                               # whatever a parser of damaged files meets
    return None, _line(e)
  finally:
    asyncio.new_event_loop = new_loop


class _PatientLoop(asyncio.SelectorEventLoop):
  """Waits for what it has begun.

  After one damaged array Orbax closes its loop over the reads of the others, and each of them
  prints a page as it dies.
  """

  def close(self):
    if not self.is_closed() and (tasks := asyncio.all_tasks(self)):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


def _line(error):
  if isinstance(error, Damaged):
    return str(error)
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:150]}'
