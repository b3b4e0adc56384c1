"""Training a model from settings: which loss, which optimizer, where the state is kept."""
import contextlib
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from lean_jax import tree
from lean_jax.adapters.dropout import dropping, drops_out
from lean_jax.adapters.trained import trained
from lean_jax.distillation import losses as distilled
from lean_jax.distillation.cache import check_losses
from lean_jax.distillation.on_policy import rollout
from lean_jax.errors import InputError
from lean_jax.objectives.language_modeling import next_token
from lean_jax.quantization.ema import averaged, has_averages
from lean_jax.training import hosts
from lean_jax.training.checkpoint import Checkpoints
from lean_jax.training.loop import STOPS, fit, watch
from lean_jax.training.metrics import Metrics
from lean_jax.training.optimizer import adamw
from lean_jax.training.profile import Profile, steps_of
from lean_jax.training.rates import Rates, step_flops


def train(module, params, batches, *, steps, teacher=None, cached=False, losses=None,
          on_policy=None, objective=None, trainable=None, mesh=None, accumulate=1, seed=0,
          folder=None, save_every=200, log_every=10, hooks=(), stop=lambda: False,
          on_nonfinite='stop', spike=None, profile=None, **schedule):
  """Trains by hard labels, or by what a teacher shows.

  Args:
    module, params: the model.
    batches: as `fit` takes them.
    steps, schedule: of `optimizer.adamw`: peak, warmup, decay, weight_decay, clip, b_ratio.
    teacher: None, or (module, params); or a list of several.
    cached: whether the batches have a teacher's labels: see `distillation.cache`.
    losses: with a teacher or its labels, the list of `distillation.losses.parsed`; None is
      `soft_and_hard()`.
    on_policy: with a teacher, None, or the settings of `distillation.on_policy.rollout`: on some
      steps the losses are on what the student writes; cross_entropy then does not count.
    objective: another loss, as `fit` takes it, and what JSON holds of it; instead of a teacher.
      What it learns itself is in params as `distillation.losses.PROJECTIONS`.
    trainable: a pattern on arrays' names; None is the adapters where there are any, else all. What
      the losses learn themselves trains too.
    folder: where checkpoints and metrics go, one for all hosts; None keeps nothing.
    save_every, log_every: steps.
    on_nonfinite, spike: of `loop.watch`.
    profile: None, or '10:15', the steps to trace into `folder`/profile.
    accumulate, mesh, seed, hooks, stop: of `fit`.

  Returns:
    params, seconds: as `fit`.
  """
  made = prepared(
      module, params, steps=steps, teacher=teacher, cached=cached, losses=losses,
      on_policy=on_policy, objective=objective, trainable=trainable, accumulate=accumulate,
      seed=seed, **schedule)
  settings = made.settings
  watched = watch(on_nonfinite, spike)
  if watched != STOPS:                               # else as it always was: old runs go on
    settings |= dict(on_nonfinite=on_nonfinite, spike=spike)
  if profile is not None and folder is None:
    raise InputError(f'profile {profile!r} without a folder; give a workdir to write it to')
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if profile is not None:
      hooks = (*hooks, stack.enter_context(
          Profile(pathlib.Path(folder, 'profile'), *steps_of(profile))))
    if folder is not None:
      checkpoints = stack.enter_context(Checkpoints(pathlib.Path(folder, 'checkpoints'),
                                                    every=save_every))
      if hosts.first():
        rates = rates_of(module, params, batches, trainable, teacher, mesh, steps)
        hooks = (*hooks, stack.enter_context(Metrics(folder, every=log_every, rates=rates)))
    params, seconds = fit(
        made.loss, made.params, batches, made.tx, steps=steps, trainable=made.trainable,
        frozen=made.frozen, mesh=mesh, accumulate=accumulate, seed=seed, hooks=hooks,
        checkpoints=checkpoints, settings=settings, stop=stop, watched=watched,
        rollout=made.rollout)
  return {k: v for k, v in params.items() if k not in distilled.LEARNED}, seconds


class Prepared(NamedTuple):
  """What `fit` is given for `train`.

  Attributes:
    tx: the optimizer.
    loss, frozen, rollout: as of `fit`.
    params: with what the losses learn.
    trainable: the pattern of what trains.
    settings: that a resume compares.
  """
  tx: Any
  loss: Callable
  params: Any
  trainable: str
  frozen: dict
  rollout: Callable | None
  settings: dict


def prepared(module, params, *, steps, teacher=None, cached=False, losses=None, on_policy=None,
             objective=None, trainable=None, accumulate=1, seed=0, peak, warmup=0, decay='cosine',
             weight_decay=0., clip=1., b_ratio=1.):
  """The Prepared of settings of `train`."""
  if teacher is None and not cached and losses is not None:
    raise InputError('losses without a teacher; give one, or leave them out')
  if teacher is None and on_policy is not None:
    raise InputError('on_policy without a teacher to score what the student writes; give one')
  schedule = dict(steps=steps, peak=peak, warmup=warmup, decay=decay, weight_decay=weight_decay,
                  clip=clip, b_ratio=b_ratio)
  tx = averaged(adamw(**schedule)) if has_averages(params) else adamw(**schedule)
  settings = dict(schedule, accumulate=accumulate)
  trainable = trainable or trained(params) or '.*'
  frozen, written = {}, None
  if objective is not None:
    loss, told = objective
    settings |= dict(objective=told)
    if distilled.PROJECTIONS in params:
      trainable = f'{trainable}|{distilled.PROJECTIONS}/.*'
  elif teacher is None and not cached:
    loss = _next_token(module)
  else:
    try:                                               # a resume compares it
      text = json.dumps(distilled.soft_and_hard() if losses is None else losses, sort_keys=True)
    except TypeError as error:
      raise InputError(f'losses of more than numbers, strings, lists, dicts: {error}') from error
    if cached:
      check_losses(json.loads(text))
      teachers = ()
    else:
      teachers, known = zip(*_several(teacher))
      frozen = dict(teacher_params=known)
    terms, loss = _distillation(module, teachers, text)
    settings |= dict(losses=json.loads(text))
    if on_policy is not None:
      written = _on_policy(module, on_policy, terms, seed)
      settings |= dict(on_policy=dict(on_policy))
    if learned := distilled.learned(terms, jax.random.key(seed)):
      params = {**params, **learned}
      trainable = '|'.join([trainable, *(f'{name}/.*' for name in learned)])
  if drops_out(params):
    loss = dropping(loss)
  return Prepared(tx, loss, params, trainable, frozen, written, settings)


def rates_of(module, params, batches, trainable, teacher, mesh, steps):
  """The Rates of a run; of its tokens where a batch has any, else of nothing that it can count."""
  rows, length = getattr(batches, 'batch', None), getattr(batches, 'length', None)
  if rows is None or length is None:
    return None
  try:
    train, _ = tree.split(params, trainable or trained(params) or '.*')
  except InputError:                                   # `fit` says it
    return None
  teachers = [(m.config, p) for m, p in _several(teacher)] if teacher else []
  flops = step_flops(module.config, params, train, teachers, rows, length)
  return Rates(steps, rows * length, flops, 1 if mesh is None else mesh.size)


def _several(teacher):
  return teacher if isinstance(teacher, list) else [teacher]


def _on_policy(module, given, terms, seed):
  """The rollout of the settings that a user gives."""
  try:
    made = rollout(module, **given, seed=seed)
  except TypeError as error:
    raise InputError(f'on_policy {given!r}; expected dict(tokens=, fraction=, temperature=), with '
                     'ends= from training.recipe') from error
  if given.get('fraction') == 1 and any(t.kind == distilled.HARD for t in terms):
    raise InputError('cross_entropy counts on the steps whose text is the data, and on_policy with '
                     'fraction 1 leaves none; leave it out, or lower the fraction')
  return made


# The same loss object for the same settings, so that its step is compiled once a process.
_next_token = functools.lru_cache(next_token)


@functools.lru_cache
def _distillation(student, teachers, text):
  """The Terms of a list of losses, as JSON, and the loss of them."""
  known = tuple(t.config for t in teachers) or student.config       # labels are of its vocabulary
  terms = distilled.parsed(student.config, known, json.loads(text))
  return terms, distilled.weighted(student, teachers, terms)
