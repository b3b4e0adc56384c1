"""Students: where they start, and what they learn from their teachers."""
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lean_jax.api.model import Model
from lean_jax.api.training import train
from lean_jax.calibration.text import of_windows
from lean_jax.data.packed import check_reads_text, packed_windows
from lean_jax.data.paired import paired_windows
from lean_jax.distillation import narrow
from lean_jax.distillation.cache import Cache, check_teachers, open_cache, write_cache
from lean_jax.distillation.elsewhere import Elsewhere
from lean_jax.distillation.losses import check_tokenizers, soft_and_hard
from lean_jax.distillation.start import evenly
from lean_jax.errors import InputError
from lean_jax.models import fresh
from lean_jax.report.progress import Bars

STARTS = ('alternating', 'importance', 'random')       # of a student


def cache_teacher(teacher: Model, data, folder, *, k: int = 64, window: int | None = None,
                  field: str = 'text', **settings) -> Cache:
  """Writes a teacher's k most probable tokens after each of a text, for `distill(cache=folder)`.

  Their size is printed first. The same call goes on where it was killed; several hosts that make it
  at once each write a part.

  Args:
    data: as `train` takes it; of a source, the split that trains.
    folder: made where there is none; the same on all hosts.
    window: tokens a window; None is the teacher's context, at most 512.
    settings: batch, of `distillation.cache.write_cache`.

  Raises:
    InputError: as there.
  """
  bars, window = Bars(), window or min(teacher.config.context, 512)
  with (packed_windows(data, 'train', teacher, window, field) as windows,
        bars.bar('labels') as update):
    return write_cache(teacher, windows, folder, k=k, progress=update,
                       say=lambda text: bars.line('labels', text), **settings)


def distill(teacher: Model | Sequence[Model] | None, data, *, student: Model | None = None,
            keep: int | None = None, temperature: float | None = None,
            soft_weight: float | None = None, losses: Sequence[Mapping[str, Any]] | None = None,
            cache=None, init: str = 'alternating',
            on_policy: Mapping[str, Any] | None = None, teacher_mesh=None, top_k: int = 64,
            **settings) -> Model:
  """A smaller model trained on what the teacher shows, and on the text.

  Args:
    teacher: one, or several, by number in the losses; None with a cache and a student.
    student: where it starts; None makes it of the (first) teacher, as `init` says. With another
      tokenizer than the teachers', the loss is 'uld', and texts are read in both.
    keep: how many layers; None is half of them.
    init: which: 'alternating', evenly spread ones; 'importance', those of most influence on the
      data (see `cut`, which cuts widths too); or 'random', fresh ones and nothing of the teacher.
    temperature, soft_weight: of soft labels (2 and .7); the text's own have the rest.
    losses: instead of these, a list such as [dict(kind='reverse_kl', temperature=2.),
      dict(kind='hidden', weight=.5)]: see `distillation.losses.parsed`.
    cache: a folder of `cache_teacher` of the same data: the teacher's labels are read from it.
    on_policy: dict(fraction=.5, tokens=64, temperature=1.): on this part of the steps, the student
      writes the last `tokens` of each window itself, and the losses are on that: see
      `distillation.on_policy`.
    teacher_mesh: of `training.mesh.make_mesh`, of other devices than `mesh` is: the teacher works
      on them, a batch ahead, and the losses are on its `top_k` most probable tokens and the rest,
      as those of a cache: see `distillation.elsewhere`, also of several hosts.
    settings: of `train`.

  Raises:
    InputError: another tokenizer and a loss that compares token by token, a loss that cannot be,
      temperature and soft_weight with losses, or a cache of something else.
  """
  if teacher is None and (cache is None or student is None):
    raise InputError('no teacher; give one, or both a cache of its labels and a student')
  teachers = [teacher] if isinstance(teacher, Model) else list(teacher or ())
  if cache is not None:
    cache = cache if isinstance(cache, Cache) else open_cache(cache)
    check_teachers(cache, teachers)
  for one in teachers:
    check_reads_text(one)
  if student is None:
    student = student_of(teachers[0], keep, init, data, settings)
  of_labels = {k: v for k, v in dict(temperature=temperature, soft_weight=soft_weight).items()
               if v is not None}
  if losses is None:
    losses = soft_and_hard(**dict(soft_weight=.7) | of_labels)
  elif of_labels:
    raise InputError(f'losses and {" and ".join(of_labels)} too; say them in the losses')
  if cache is not None:
    if on_policy is not None:
      raise InputError('a cache has no labels of what the student writes; leave it or on_policy '
                       'out')
    return train(student, data, cache=cache, losses=losses, **settings)
  if teacher_mesh is not None:
    if len(teachers) > 1 or on_policy is not None or (
        _tokenizer(teachers) != student.tokenizer.fingerprint):
      raise InputError('teacher_mesh is for one teacher, of the same tokenizer, and for texts; '
                       'leave it, or the other teachers and on_policy, out')
    return train(student, data, cache=Elsewhere(teachers[0], teacher_mesh, top_k), losses=losses,
                 **settings)
  if on_policy is not None:
    if not isinstance(on_policy, Mapping):
      raise InputError(f'on_policy {on_policy!r}; expected dict(fraction=.5, tokens=64), say')
    settings['on_policy'] = dict(on_policy, ends=list(student.tokenizer.ends))
  with contextlib.ExitStack() as stack:
    if _tokenizer(teachers) != student.tokenizer.fingerprint:
      check_tokenizers([x.get('kind') for x in losses if isinstance(x, Mapping)])
      if on_policy is not None:
        raise InputError("what the student writes is not in the teacher's tokens, which are of "
                         'another tokenizer; leave on_policy out')
      window = settings.pop('window', None) or min(
          512, *(m.config.context for m in (student, *teachers)))
      data = stack.enter_context(paired_windows(
          data, 'train', student, teachers, window, settings.pop('field', 'text')))
    return train(student, data, teacher=[(one.module, one.params) for one in teachers],
                 losses=losses, **settings)


def cut(model: Model, data, *, layers: int | None = None, heads: int | None = None,
        groups: int | None = None, hidden: int | None = None, width: int | None = None,
        samples: int = 64, batch: int = 8, window: int | None = None,
        field: str = 'text') -> Model:
  """The model with only so much of it, what matters most on a text: a student to distill.

  Layers are those of most block influence (ShortGPT), heads, hidden units and channels those of the
  greatest activations (Minitron): see `distillation.importance` and `distillation.narrow`.

  Args:
    data: a path (see `data.sources.open_source`), a Source, or Windows: the calibration text.
    layers, heads, groups, hidden, width: how many are kept; None keeps all.
    samples, batch: windows of the text, and how many at a time.
    window: tokens; None is the model's context, at most 512.

  Raises:
    InputError: nothing to cut, a number out of range, or a model that has no such parts.
  """
  wide = {k: v for k, v in dict(heads=heads, groups=groups, hidden=hidden, width=width).items()
          if v is not None}
  if layers is None and not wide:
    raise InputError('nothing to cut; give layers, heads, groups, hidden or width')
  window = window or min(model.config.context, 512)
  with packed_windows(data, 'train', model, window, field) as windows:
    batches = of_windows(windows, samples, batch)
    config, params = narrow.cut(model.config, model.params, batches, layers, wide)
  if unsaid := _unsaid(model.family, config) - _unsaid(model.family, model.config):
    raise InputError(f'a {model.family.model_type} cut like this has a {min(unsaid)} that its '
                     'config.json cannot say, as it follows from what was cut; cut other parts')
  return dataclasses.replace(model, config=config, params=params)


def _unsaid(family, config):
  """The fields of a config that are others when it is read from the config.json it is written to.
  """
  known = family.from_hf(family.to_hf(config))
  return {f.name for f in dataclasses.fields(config)
          if getattr(known, f.name) != getattr(config, f.name)}


def student_of(teacher, keep, init='alternating', data=None, settings=None):
  """A student of `keep` of a teacher's layers, half of them if None, as `init` says."""
  keep, settings = keep or teacher.config.layers // 2, settings or {}
  if init not in STARTS:
    raise InputError(f'init {init!r}; expected one of {", ".join(STARTS)}')
  if init == 'importance':
    given = {k: settings[k] for k in ('window', 'field') if k in settings}
    return cut(teacher, data, layers=keep, **given)
  student = evenly(teacher, keep)
  if init == 'random':
    params = fresh.drawn(student.config, settings.get('seed', 0))
    student = dataclasses.replace(student, params=params)
  return student


def _tokenizer(teachers):
  """The fingerprint of the tokenizer of all teachers."""
  one, *rest = {m.tokenizer.fingerprint: m.tokenizer.size for m in teachers}.items()
  if rest:
    raise InputError(f'teachers of {len(rest) + 1} tokenizers, of {one[1]} and {rest[0][1]} '
                     'tokens; give teachers of one')
  return one[0]
