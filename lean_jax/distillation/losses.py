"""A weighted list of losses from a config, as one loss of a student and its teacher."""
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.distillation import terms
from lean_jax.distillation.cache import IDS, LOG_PROBS
from lean_jax.distillation.schedules import schedule
from lean_jax.distillation.soft_labels import known_labels, soft_labels
from lean_jax.distillation.uld import ALIGN, reading, uld
from lean_jax.errors import InputError
from lean_jax.kernels.distill_loss import api as distill_loss
from lean_jax.kernels.distill_loss.kinds import KINDS as DIVERGENCES
from lean_jax.kernels.distill_loss.kinds import divergence
from lean_jax.kernels.distill_loss.reference import Known, logits, product
from lean_jax.models.segments import located
from lean_jax.nn.taps import STATES
from lean_jax.objectives.forward import hidden, run, targets, token_axes
from lean_jax.objectives.language_modeling import cross_entropy
from lean_jax.tree import named_arrays

HARD, ULD = 'cross_entropy', 'uld'
LEARNED = terms.Learned._fields     # where the tree of trained parameters has the losses' own
PROJECTIONS = LEARNED[0]


class Term(NamedTuple):
  """One loss of the list.

  Attributes:
    name: of its value among the metrics.
    weight: steps done -> number.
    kind: of labels: `HARD`, `ULD` or one of `DIVERGENCES`; None of taps.
    temperature: steps done -> number; None but of a divergence or `ULD`.
    options: of these.
    looks: a `terms.Looks`; None of labels.
    teacher: its number.
    side: of taps of an encoder and a decoder, the stack: 'encoder/' or 'decoder/'.
  """
  name: str
  weight: Callable
  kind: str | None = None
  temperature: Callable | None = None
  options: Any = None
  looks: Any = None
  teacher: int = 0
  side: str = ''


def parsed(student, teachers, losses):
  """The Terms of a config's list.

  Args:
    student: its config.
    teachers: a config, or a tuple of several's.
    losses: dicts: `kind`, of labels 'cross_entropy', 'uld' or one of `distill_loss`, or of taps one
      of `terms.KINDS`; `weight` (1), `name` (the kind), `teacher` (0, the first of several); the
      temperature (1) of soft labels; the kind's own options: of 'uld' `align`, of `uld.ALIGN`, the
      first without. Of taps of encoder-decoders `side`, 'encoder' or 'decoder'. Weights and
      temperatures may be what `schedule` takes.

  Raises:
    InputError: a kind, an option or a number that there is not, two of one name, vocabularies that
      differ, or a list that does not look at a teacher.
  """
  if not losses:
    raise InputError("no losses; give some, dict(kind='forward_kl') say")
  if not all(isinstance(given, Mapping) for given in losses):
    raise InputError(f"losses {losses!r}; expected a list of dicts, [dict(kind='forward_kl')] say")
  teachers = _several(teachers)
  out = [_term(student, teachers, dict(given)) for given in losses]
  names = [t.name for t in out]
  odd = [n for n in names if names.count(n) > 1 or n in ('loss', 'grad_norm')]
  if odd:
    raise InputError(f'several values would be named {odd[0]!r}; give the losses a name each: '
                     "dict(kind=..., name='another')")
  hard = [t.kind == HARD for t in out]
  if sum(hard) > 1:
    raise InputError('cross_entropy twice; one with the sum of both weights is the same')
  unseen = set(range(len(teachers))) - {t.teacher for t in out if t.kind != HARD}
  if unseen and len(teachers) > 1:
    raise InputError(f'no loss looks at teacher {min(unseen)} of {len(teachers)}; give one, '
                     f'dict(kind=..., teacher={min(unseen)}), or leave the teacher out')
  if all(hard):
    raise InputError('the only loss is cross_entropy, which needs no teacher; add one that looks '
                     f'at it: {", ".join([*DIVERGENCES, ULD, *terms.KINDS])}')
  return tuple(out)


def weighted(student, teachers, losses):
  """The loss (params, batch, key, step, teacher_params=) -> (scalar, {name: value}) of Terms.

  It is the sum of each value times its weight, and of the student's auxiliary losses. The teacher
  is an argument of the compiled step, inside it, and has no gradient. Where all heads are matrices
  of floats, nobody's logits are ever all in memory; see `kernels.distill_loss`.

  Args:
    student: a module.
    teachers: a module; or a tuple of several, and teacher_params is then one too. With () there
      are none, and a batch has a teacher's labels: see `cache.LabelledBatches`.
    losses: from `parsed`.
  """
  labels, taps = [t for t in losses if t.looks is None], [t for t in losses if t.looks is not None]
  wanted = tuple(sorted({c for t in taps for c in t.looks.taps}))
  teachers = _several(teachers)
  sides = {t.side for t in taps}

  def loss(params, batch, key, step=0, *, teacher_params=()):
    del key
    theirs = teachers_batch(batch)
    if theirs is not batch:
      check_tokenizers([t.name for t in losses if t.kind not in (HARD, ULD)])
    one, *others = _seen((student, *teachers), (params, *_several(teacher_params)),
                         (batch, *[theirs] * len(teachers)), wanted)
    others = others or [Known(*(x.reshape(-1, x.shape[-1]) for x in (batch[IDS],
                                                                     batch[LOG_PROBS])))]
    near = [t for t in labels if t.kind != ULD and not (t.kind == HARD and 'sampled' in batch)]
    total, values = _labels(near, one, others, batch, step) if near else (0., {})
    for t in labels:
      if t.kind == ULD:
        value = uld(_reading(one, batch, t), _reading(others[t.teacher], theirs, t),
                    t.temperature(step))
        total, values[t.name] = total + t.weight(step) * value, value
    shown = {side: [tapped(m.config, seen.taps, side) for m, seen in zip(
        (student, *teachers), (one, *others))] for side in sides}
    for t in taps:
      mine, *rest = shown[t.side]
      learned = terms.Learned(*(params.get(tree, {}).get(t.name) for tree in LEARNED))
      value = t.looks.value(mine, rest[t.teacher], _real(batch, t.side), learned)
      total, values[t.name] = total + t.weight(step) * value, value
    return total + one.auxiliary, jax.lax.stop_gradient(values)
  return loss


def soft_and_hard(temperature=2., soft_weight=.5):
  """The list for `parsed` of soft labels and the rest hard ones: Hinton et al. 2015."""
  return (dict(kind='forward_kl', name='soft', weight=soft_weight, temperature=temperature),
          dict(kind=HARD, name='hard', weight=1 - soft_weight))


def distillation(student, teacher, *, temperature, soft_weight):
  """`weighted` of `soft_and_hard` labels, of two modules with the same vocabulary."""
  return weighted(student, teacher, parsed(
      student.config, teacher.config, soft_and_hard(temperature, soft_weight)))


def learned(losses, key):
  """{tree of `LEARNED`: {name: array}} of what Terms learn: `projections`, and maps of zeros."""
  maps = {t.name: jnp.zeros(t.looks.learned.layer_maps) for t in losses
          if t.looks is not None and t.looks.learned.layer_maps is not None}
  each = zip(LEARNED, (projections(losses, key), maps), strict=True)
  return {name: own for name, own in each if own}


def projections(losses, key):
  """{name: matrix} of the Terms that learn one; entries are normal, of variance 1 / D."""
  shapes = {t.name: t.looks.learned.projections for t in losses
            if t.looks is not None and t.looks.learned.projections is not None}
  return {name: jax.random.normal(jax.random.fold_in(key, k), shape) * shape[0] ** -.5
          for k, (name, shape) in enumerate(shapes.items())}


def teachers_batch(batch):
  """The batch as teachers read it: its `teacher_` arrays where their tokenizer is another."""
  own = {k.removeprefix('teacher_'): x for k, x in batch.items() if k.startswith('teacher_')}
  return own or batch


def check_tokenizers(kinds):
  """Raises InputError for losses, by name, that compare token by token, of other tokenizers."""
  if odd := [kind for kind in kinds if kind not in (HARD, ULD)]:
    raise InputError(f'{odd[0]} compares token by token, and the teacher reads by another '
                     "tokenizer than the student; give dict(kind='uld', align='spans'), and "
                     'cross_entropy if you like')


def tapped(config, found, side=''):
  """The Tapped of {collection: tree}, of stacked layers or of ones written out."""
  config = config.stacks[side]
  layers, embedding = [{} for _ in config.each], None
  for collection, sown in found.items():
    for path, x in named_arrays(sown).items():
      if not path.startswith(side):
        continue
      path = path.removeprefix(side)
      inner, at = located(config, path)
      *_, name, _ = inner.split('/')                               # the last is sow's own tuple
      if at is None:
        embedding = x if collection == STATES and path.startswith('embedding/') else embedding
      elif isinstance(at, int):
        layers[at][name] = x
      else:
        for k, n in enumerate(at):
          layers[n][name] = x[k]
  return terms.Tapped(layers, embedding)


class _Seen(NamedTuple):
  """A model on a batch: `head` to go through, or else its `logits`."""
  head: Any
  logits: Any
  taps: Any
  auxiliary: Any


def _several(x):
  return x if isinstance(x, tuple) else (x,)


def _real(batch, side):
  """[B T], which tokens of a stack's are real."""
  side = 'decoder_' if side == 'decoder/' else ''
  return batch.get(f'{side}mask', jnp.ones(batch[f'{side}tokens'].shape, bool))


def _reading(seen, batch, term):
  """The `uld.Reading` of a model."""
  x, (_, counted) = seen.head, targets(batch)
  if x is None:
    return reading(seen.logits, lambda rows: rows, batch, counted, **term.options)
  states = x.states.reshape(*counted.shape, -1)
  return reading(states, lambda rows: logits(product(rows, x.matrix, x.head), x.head), batch,
                 counted, **term.options)


def _seen(modules, params, batches, taps):
  """The _Seen of each model on its batch: all by their heads, or all by their logits."""
  each = tuple(zip(modules, params, batches))
  heads = [hidden(m, p, batch, taps) for m, p, batch in each]
  if None not in heads:
    return [_Seen(x, None, x.taps, x.auxiliary) for x in heads]
  return [_Seen(None, y, shown, auxiliary) for y, auxiliary, shown in (
      run(m, p, batch, taps) for m, p, batch in each)]


def _labels(losses, one, others, batch, step):
  """The weighted sum of losses on labels, and the value of each."""
  wanted, mask = targets(batch)
  if one.head is None:
    values = {t.name: cross_entropy(one.logits, wanted, mask) if t.kind == HARD else
              _soft(one.logits, others[t.teacher], mask, t, step) for t in losses}
    return sum(t.weight(step) * values[t.name] for t in losses), values
  x = one.head
  shared = dict(weights=mask.reshape(-1), axes=token_axes())
  hard = next((t for t in losses if t.kind == HARD), None)
  if losses == [hard]:
    value = distill_loss.cross_entropy(x.states, x.matrix, wanted.reshape(-1), head=x.head,
                                       **shared)
    return hard.weight(step) * value, {hard.name: value}
  total, values = 0., {}
  for k, t in enumerate(t for t in losses if t.kind != HARD):
    with_it = hard if k == 0 else None                        # the first takes it, in one pass
    weight = t.weight(step)
    both = weight if with_it is None else weight + with_it.weight(step)
    value, parts = _fused(
        x, others[t.teacher], kind=t.kind, temperature=t.temperature(step),
        labels=None if with_it is None else wanted.reshape(-1),
        soft_weight=1. if with_it is None else _share(weight, both), student=x.head, **shared,
        **t.options)
    total, values[t.name] = total + both * value, parts['soft']
    if with_it is not None:
      values[with_it.name] = parts['hard']
  return total, values


def _soft(logits, other, mask, term, step):
  """The value of a loss on soft labels, of the student's logits."""
  settings = dict(kind=term.kind, temperature=term.temperature(step), **term.options)
  if isinstance(other, Known):
    return known_labels(logits, other, mask, **settings)
  return soft_labels(logits, other.logits, mask, **settings)


def _fused(x, other, **settings):
  """The same and more of the student's hidden states: see `distill_loss`."""
  if isinstance(other, Known):
    return distill_loss.known_loss(x.states, x.matrix, *other, **settings)
  y = other.head
  return distill_loss.distill_loss(x.states, x.matrix, y.states, y.matrix, teacher=y.head,
                                   **settings)


def _share(part, whole):
  """part / whole, 1 where both are 0."""
  if isinstance(whole, float):
    return part / whole if whole else 1.
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.), 1.)


def _term(student, teachers, given):
  kind = given.pop('kind', None)
  known = [HARD, *DIVERGENCES, ULD, *terms.KINDS]
  if kind not in known:
    raise InputError(f'no loss of kind {kind!r}; there are: {", ".join(known)}')
  name = given.pop('name', kind)
  weight = schedule(given.pop('weight', 1.), f'weight of {name}')
  which = 0 if kind == HARD else given.pop('teacher', 0)
  if which not in range(len(teachers)):
    raise InputError(f'{name} of teacher {which!r}; there are {len(teachers)}, numbered from 0')
  teacher = teachers[which]
  if kind in terms.KINDS:
    side = _side(name, student, teacher, given)
    own = inspect.signature(terms.KINDS[kind]).parameters
    _check_options(kind, given, [n for n, p in own.items() if p.kind == p.KEYWORD_ONLY])
    missing = [n for n, p in own.items()
               if p.kind == p.KEYWORD_ONLY and p.default is p.empty and n not in given]
    if missing:
      raise InputError(f'{kind} without {missing[0]}; give it')
    looks = terms.KINDS[kind](student.stacks[side], teacher.stacks[side], **given)
    return Term(name, weight, looks=looks, teacher=which, side=side)
  if kind == HARD:
    _check_options(kind, given, [])
    return Term(name, weight, HARD)
  if kind == ULD:
    temperature = schedule(given.pop('temperature', 1.), f'temperature of {name}', positive=True)
    _check_options(kind, given, ['teacher', 'temperature', 'align'])
    align = given.get('align', ALIGN[0])
    if align not in ALIGN:
      raise InputError(f'align {align!r} of {name}; expected one of {", ".join(ALIGN)}')
    return Term(name, weight, ULD, temperature, dict(align=align), teacher=which)
  if student.vocabulary != teacher.vocabulary:
    raise InputError(f'the teacher has a vocabulary of {teacher.vocabulary} and the student of '
                     f'{student.vocabulary}; soft labels ({kind}) need the same tokenizer in both; '
                     'uld does not; nor do, of two heads on one tokenizer, hidden, cka, minilmv2')
  temperature = schedule(given.pop('temperature', 1.), f'temperature of {name}', positive=True)
  try:
    divergence(kind, given, student.vocabulary)
  except ValueError as error:
    raise InputError(str(error)) from error
  return Term(name, weight, kind, temperature, given, teacher=which)


def _side(name, student, teacher, given):
  """Where the stack is that a loss on taps looks at."""
  side = given.pop('side', None)
  sides = ['encoder/', 'decoder/']
  pairs = {whose: list(c.stacks) == sides for whose, c in dict(
      student=student, teacher=teacher).items()}
  if len(set(pairs.values())) > 1:
    raise InputError(f'{name} compares the layers of a stack with those of a pair of stacks; only '
                     'losses on labels are for those')
  if not pairs['student']:
    if side is not None:
      raise InputError(f'side {side!r} of {name}; these models have one side; leave it out')
    return ''
  if f'{side}/' not in sides:
    raise InputError(f"{name} of encoder-decoders needs side='encoder' or side='decoder', got "
                     f'{side!r}; give one')
  return f'{side}/'


def _check_options(kind, given, own):
  odd = [n for n in given if n not in own]
  if odd:
    raise InputError(f'{kind} has no {odd[0]!r}; it has: {", ".join(["weight", "name", *own])}')
