"""Training a model from settings: which loss, which optimizer, where the state is kept."""
import contextlib
import functools
import json
import pathlib

import jax

from lean_jax import tree
from lean_jax.adapters.dropout import dropping, drops_out
from lean_jax.adapters.trained import trained
from lean_jax.distillation import losses as distilled
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


def train(module, params, batches, *, steps, teacher=None, losses=None, trainable=None, mesh=None,
          accumulate=1, seed=0, folder=None, save_every=200, log_every=10, hooks=(),
          stop=lambda: False, on_nonfinite='stop', spike=None, profile=None, **schedule):
  """Trains by hard labels, or by what a teacher shows.

  Args:
    module, params: the model.
    batches: as `fit` takes them.
    steps, schedule: of `optimizer.adamw`: peak, warmup, decay, weight_decay, clip, b_ratio.
    teacher: None, or (module, params); or a list of several.
    losses: with a teacher, the list of `distillation.losses.parsed`; None is `soft_and_hard()`.
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
  tx, loss, params, trainable, frozen, settings = prepared(
      module, params, steps=steps, teacher=teacher, losses=losses, trainable=trainable,
      accumulate=accumulate, seed=seed, **schedule)
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
      first = checkpoints.latest() or 0
      if hosts.first():
        rates = rates_of(module, params, batches, trainable, teacher, mesh, steps)
        hooks = (*hooks, stack.enter_context(
            Metrics(folder, every=log_every, first=first, rates=rates)))
    params, seconds = fit(
        loss, params, batches, tx, steps=steps, trainable=trainable, frozen=frozen, mesh=mesh,
        accumulate=accumulate, seed=seed, hooks=hooks, checkpoints=checkpoints, settings=settings,
        stop=stop, watched=watched)
  return {k: v for k, v in params.items() if k != distilled.PROJECTIONS}, seconds


def prepared(module, params, *, steps, teacher=None, losses=None, trainable=None, accumulate=1,
             seed=0, peak, warmup=0, decay='cosine', weight_decay=0., clip=1., b_ratio=1.):
  """What `fit` is given for `train`; args as there.

  Returns:
    the optimizer, the loss, params with what the losses learn, the pattern of what trains, frozen,
    and the settings that a resume compares.
  """
  if teacher is None and losses is not None:
    raise InputError('losses without a teacher; give one, or leave them out')
  schedule = dict(steps=steps, peak=peak, warmup=warmup, decay=decay, weight_decay=weight_decay,
                  clip=clip, b_ratio=b_ratio)
  tx = averaged(adamw(**schedule)) if has_averages(params) else adamw(**schedule)
  settings = dict(schedule, accumulate=accumulate)
  trainable = trainable or trained(params) or '.*'
  frozen = {}
  if teacher is None:
    loss = _next_token(module)
  else:
    try:                                               # a resume compares it
      text = json.dumps(distilled.soft_and_hard() if losses is None else losses, sort_keys=True)
    except TypeError as error:
      raise InputError(f'losses of more than numbers, strings, lists, dicts: {error}') from error
    teachers, known = zip(*_several(teacher))
    terms, loss = _distillation(module, teachers, text)
    frozen = dict(teacher_params=known)
    settings |= dict(losses=json.loads(text))
    if learned := distilled.projections(terms, jax.random.key(seed)):
      params = {**params, distilled.PROJECTIONS: learned}
      trainable = f'{trainable}|{distilled.PROJECTIONS}/.*'
  if drops_out(params):
    loss = dropping(loss)
  return tx, loss, params, trainable, frozen, settings


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


# The same loss object for the same settings, so that its step is compiled once a process.
_next_token = functools.lru_cache(next_token)


@functools.lru_cache
def _distillation(student, teachers, text):
  """The Terms of a list of losses, as JSON, and the loss of them."""
  terms = distilled.parsed(student.config, tuple(t.config for t in teachers), json.loads(text))
  return terms, distilled.weighted(student, teachers, terms)
