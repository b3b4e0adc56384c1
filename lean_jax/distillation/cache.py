"""A teacher's labels on disk: written once, by one host or many, then read beside the text.

A folder has `cache.json`, what the labels are of, and `labels-NNNNN.array_record`: the labels of
consecutive windows, a record each, as `label_codes` writes them. A file of labels is there whole or
not at all, so that the call that was killed goes on with the files that are not there yet.
"""
import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np

from lean_jax import files
from lean_jax.data.batches import Batches
from lean_jax.distillation import label_codes, terms
from lean_jax.errors import InputError
from lean_jax.kernels.distill_loss.kinds import buckets
from lean_jax.training import mesh as meshes
from lean_jax.training.digest import fingerprint

FORMAT = 1                    # raised with any change of the files
HEADER = 'cache.json'
FILE = 1 << 26                # bytes of labels in a file, about
IDS, LOG_PROBS = 'label_ids', 'label_log_probs'    # of a batch


@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
  """Labels of every window of a text.

  Attributes:
    folder: where they are.
    teacher: the fingerprint of its parameters.
    tokenizer, windows: the fingerprints of both.
    vocabulary: of the teacher.
    k: tokens of a position.
    length: tokens of a window.
    count: windows.
    each: windows of a file; the last may have fewer.
  """
  folder: pathlib.Path
  teacher: str
  tokenizer: str
  windows: str
  vocabulary: int
  k: int
  length: int
  count: int
  each: int

  @property
  def codes(self) -> label_codes.Codes:
    """How a window's labels are written."""
    return label_codes.codes(self.vocabulary, self.k, self.length - 1)

  @property
  def header(self) -> dict:
    """What cache.json holds."""
    own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'folder'}
    return dict(format=FORMAT, **own)

  @property
  def paths(self) -> list[pathlib.Path]:
    """Of the files of labels, those that are not there yet included."""
    return [self.folder / f'labels-{n:05}.array_record' for n in range(-(-self.count // self.each))]

  def rows(self, number) -> range:
    """The windows of a file."""
    return range(number * self.each, min((number + 1) * self.each, self.count))

  def labels(self, rows):
    """Of windows, by their indices: ids [n T-1 k] int32, log-probabilities [n T-1 k+1] float32.

    Raises:
      InputError: a file is missing or damaged.
    """
    rows = [int(r) for r in rows]
    try:
      records = self._records.__getitems__(rows)
    except RuntimeError as error:
      raise InputError(f'{self._damaged(rows)} is damaged ({str(error).splitlines()[0]}); remove '
                       'it and make the cache again: the other files stay') from error
    return label_codes.read(self.codes, records)

  def labelled(self, batches, student):
    """Batches of the cache's windows with its labels, for a student.

    Raises:
      InputError: as of `check_labels`.
    """
    check_labels(self, student.config, student.tokenizer, batches.windows)
    return LabelledBatches(batches, self)

  def _damaged(self, rows):
    """The first file that cannot be opened, or in which one of these windows cannot be read."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    for number, path in enumerate(self.paths):
      try:
        ArrayRecordDataSource([str(path)]).__getitems__(
            [r - self.rows(number).start for r in rows if r in self.rows(number)] or [0])
      except RuntimeError:
        return path
    return self.folder

  @functools.cached_property
  def _records(self):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    missing = [path.name for path in self.paths if not path.is_file()]
    if missing:
      raise InputError(f'{self.folder} has no {missing[0]}: {len(missing)} of {len(self.paths)} '
                       'files of labels are missing; the call that makes it goes on with those')
    records = ArrayRecordDataSource([str(path) for path in self.paths])
    if len(records) != self.count:
      raise InputError(f'{self.folder} has labels of {len(records)} windows and should of '
                       f'{self.count}; make the cache again')
    return records


def open_cache(folder) -> Cache:
  """The Cache in a folder; raises InputError where there is none that is whole."""
  path = pathlib.Path(folder, HEADER)
  try:
    header = json.loads(path.read_bytes())
    found = header.pop('format')
    cache = Cache(pathlib.Path(folder), **header)
  except FileNotFoundError as error:
    raise InputError(f'{folder} holds no labels of a teacher; make them with lean.cache_teacher, '
                     'or name a folder of those') from error
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise InputError(f'{path} is no description of labels ({error}); make the cache '
                     'again') from error
  if found != FORMAT:
    raise InputError(f'{path} is of format {found} and this version reads {FORMAT}; make the cache '
                     'again')
  return cache


def write_cache(model, windows, folder, *, k=64, batch=8, file_bytes=FILE, host=None, hosts=None,
                say=None, progress=None) -> Cache:
  """Writes what a model says of every window; goes on with what is there of the same labels.

  Each host writes every `hosts`-th file. With a model of its own it works by itself; of one that is
  spread over all hosts they all compute the labels of every file together.

  Args:
    model: a `lean_jax.Model`.
    windows: of `data.windows`.
    folder: made where there is none; the same on all hosts.
    k: tokens of a position that are kept, 1 to the vocabulary.
    batch: windows at a time; changes memory and speed.
    file_bytes: of a file, about: what is lost at most where a run is killed.
    host, hosts: this process's number and how many there are; None asks JAX.
    say: called with one line before the work: what it takes on disk.
    progress: called with windows done, windows in all.

  Returns:
    the Cache; with several hosts it is whole when all are done.

  Raises:
    InputError: the folder has labels of something else, the disk is too small, or k is out of
      range.
  """
  if batch < 1 or file_bytes < 1:
    raise InputError(f'{batch} windows at a time, files of {file_bytes} bytes; give 1 or more')
  if not 2 <= windows.length <= model.config.context:
    raise InputError(f'windows of {windows.length} tokens and a model that reads '
                     f'{model.config.context}; give 2 to as many')
  host = jax.process_index() if host is None else host
  hosts = jax.process_count() if hosts is None else hosts
  form = label_codes.codes(model.config.vocabulary, k, windows.length - 1)
  record = sum(form.sizes)
  cache = Cache(pathlib.Path(folder), fingerprint(model.params), model.tokenizer.fingerprint,
                windows.fingerprint, model.config.vocabulary, k, windows.length, len(windows),
                max(1, file_bytes // record))
  if (cache.folder / HEADER).exists():
    check_same(cache.header, open_cache(folder).header, f'{folder} has labels of')
  missing = [n for n, path in enumerate(cache.paths) if not path.exists()]
  needed = sum(len(cache.rows(n)) * (record + 128) + (1 << 18) for n in missing)  # of array_record
  cache.folder.mkdir(parents=True, exist_ok=True)
  free = shutil.disk_usage(cache.folder).free
  if say:
    entries = len(windows) * form.positions * k
    say(f'{len(windows):,} windows of {windows.length} tokens, {k} of {cache.vocabulary:,}: '
        f'{len(windows) * record:,} bytes in {len(cache.paths)} files, '
        f'{len(windows) * record / entries:.2f} an entry; to write: {needed:,}, free: {free:,}')
  if needed > free:
    raise InputError(f'the labels need {needed:,} bytes and the disk of {folder} has {free:,}; '
                     'give a smaller k, less text, or another disk')
  if host == 0:
    files.write_text(cache.folder / HEADER, json.dumps(cache.header, indent=1) + '\n')
  spread = not all(x.is_fully_addressable for x in jax.tree.leaves(model.params)
                   if isinstance(x, jax.Array))
  turns = _agreed(missing, len(cache.paths)) if spread else [
      n for n in missing if n % hosts == host]
  done, total = 0, sum(len(cache.rows(n)) for n in turns)
  for number in turns:
    place = (files.replacing_path(cache.paths[number]) if number % hosts == host
             else contextlib.nullcontext())
    with place as path:
      for count in _write(path, model, windows, cache.rows(number), form, batch, spread):
        done += count
        if progress:
          progress(done, total)
  return cache


def check_same(mine, found, what):
  """Raises InputError for the first of a header's facts that is another in the one found."""
  for name, value in mine.items():
    if found[name] != value:
      raise InputError(f'{what} another {name} ({found[name]}, now {value}); name another folder')


def check_labels(cache, config, tokenizer, windows):
  """Raises InputError where labels are not for a student of this config, its text and tokenizer."""
  for what, found, now in (
      ('tokenizer', cache.tokenizer, tokenizer.fingerprint),
      ('vocabulary', cache.vocabulary, config.vocabulary),
      ('window length', cache.length, windows.length), ('windows', cache.windows,
                                                        windows.fingerprint)):
    if found != now:
      raise InputError(f'the labels in {cache.folder} were made with another {what} ({found}, the '
                       f'student has {now}); make them anew, or give what they were made with')


def check_teachers(cache, teachers):
  """Raises InputError where models are given whose labels these are not."""
  if len(teachers) > 1:
    raise InputError(f'{len(teachers)} teachers and a cache, which has the labels of one; give '
                     'that one')
  for model in teachers:
    found = fingerprint(model.params)
    if found != cache.teacher:
      raise InputError(f'the labels in {cache.folder} are of the teacher {cache.teacher}, and '
                       f'{found} is given; give that one, or make its cache')


def check_losses(losses):
  """Raises InputError for losses of a list that need more of a teacher than its labels."""
  for given in losses:
    kind = given.get('kind') if isinstance(given, dict) else None
    if kind in terms.KINDS:
      raise InputError(f'{kind} looks at layers of the teacher, and a cache or a teacher_mesh '
                       'gives its labels alone; leave the loss out, or those')
    if kind == 'uld':
      raise InputError('uld is for another tokenizer, and a cache or a teacher_mesh gives labels '
                       'of the same tokens; leave the loss out, or those')
    if kind == 'top_k':
      raise InputError('top_k of a cache or a teacher_mesh, which give the top k alone; forward_kl '
                       'of it is that')


class Labelled:
  """What has `batches`, a `data.batches.Batches`, and gives them with labels."""
  batches: Batches

  @property
  def batch(self) -> int:
    """Windows a step."""
    return self.batches.batch

  @property
  def length(self) -> int:
    """Tokens of a row."""
    return self.batches.length

  def rows(self, step) -> np.ndarray:
    """The indices of the windows in a step's batch."""
    return self.batches.rows(step)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledBatches(Labelled):
  """Batches with the labels of their windows.

  Attributes:
    batches: of the cache's windows.
    cache: of their labels.
  """
  batches: Batches
  cache: Cache

  @property
  def fingerprint(self) -> str:
    """What the batches of all hosts are a function of."""
    return f'{self.batches.fingerprint} {self.cache.teacher} {self.cache.k}'

  def __getitem__(self, step) -> dict[str, np.ndarray]:
    """tokens [B T]; label_ids [B T k], int32, and label_log_probs [B T k+1], float32.

    All others' probability is the last, unless k is the vocabulary. A window's last token predicts
    nothing of it and has some labels, which no loss counts.
    """
    return self.part(step, slice(None))

  def part(self, step, rows) -> dict[str, np.ndarray]:
    """Some rows of a step's batch: what a host reads of it."""
    return dict(self.batches.part(step, rows)) | of_batch(
        *self.cache.labels(self.batches.rows(step, rows)))


def of_batch(ids, log_probs):
  """Labels [B T-1 k] and [B T-1 k+1] as a batch has them, a position more that no loss counts."""
  last = np.broadcast_to(np.arange(ids.shape[2], dtype=np.int32), (len(ids), 1, ids.shape[2]))
  even = np.full((len(ids), 1, log_probs.shape[2]), -np.log(log_probs.shape[2]), np.float32)
  return {IDS: np.concatenate([ids, last], 1), LOG_PROBS: np.concatenate([log_probs, even], 1)}


def _agreed(missing, count):
  """The files that are missing where the first host looks, on all hosts."""
  from jax.experimental.multihost_utils import broadcast_one_to_all
  flags = np.isin(np.arange(count), missing)
  return np.flatnonzero(broadcast_one_to_all(flags)).tolist()


def _write(path, model, windows, rows, form, batch, spread):
  """Writes the file of some windows; yields how many more it has, after each batch.

  Without a path it only takes part in what all hosts compute.
  """
  from array_record.python.array_record_module import ArrayRecordWriter
  from jax.experimental.multihost_utils import process_allgather
  writer = None if path is None else ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
  try:
    for start in range(rows.start, rows.stop, batch):
      some = range(start, min(start + batch, rows.stop))
      tokens = np.zeros((batch, windows.length), np.int32)               # one program for all
      tokens[:len(some)] = windows.array[some.start:some.stop]
      with meshes.of(model.params):
        found = top_labels(model.module, model.params, tokens, form.k)
      ids, log_probs = process_allgather(found, tiled=True) if spread else jax.device_get(found)
      for k in range(0 if writer is None else len(some)):
        writer.write(label_codes.written(form, ids[k], log_probs[k]))
      yield len(some)
  finally:
    if writer is not None:
      writer.close()


@functools.partial(jax.jit, static_argnames=('module', 'k'))
def top_labels(module, params, tokens, k):
  """The k most probable ids [B T-1 k] after each token but the last, and their log-probabilities.

  Those are [B T-1 k+1], the last of all other tokens together. One row's logits are in memory at a
  time.
  """
  x, _ = module.apply({'params': params}, tokens, method='hidden')                   # [B T D]

  def row(x):
    logits = module.apply({'params': params}, x[None], method='logits')[0]           # [T-1 V]
    log_p = jax.nn.log_softmax(logits.astype(jax.numpy.float32))
    _, ids = jax.lax.top_k(log_p, k)
    return ids, buckets(log_p, ids)
  return jax.lax.map(row, x[:, :-1])
