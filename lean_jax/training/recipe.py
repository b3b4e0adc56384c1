"""Training a model from settings: which loss, which optimizer, where the state is kept."""
import contextlib
import functools
import json
import pathlib

import jax

from lean_jax.adapters.dropout import dropping, drops_out
from lean_jax.adapters.trained import trained
from lean_jax.distillation import losses as distilled
from lean_jax.errors import InputError
from lean_jax.objectives.language_modeling import next_token
from lean_jax.quantization.ema import averaged, has_averages
from lean_jax.training.checkpoint import Checkpoints
from lean_jax.training.loop import fit
from lean_jax.training.metrics import Metrics
from lean_jax.training.optimizer import adamw


def train(module, params, batches, *, steps, peak, warmup=0, decay='cosine', weight_decay=0.,
          clip=1., b_ratio=1., accumulate=1, teacher=None, losses=None, objective=None,
          trainable=None, mesh=None, seed=0, folder=None, save_every=200, log_every=10, hooks=(),
          stop=lambda: False):
  """Trains by hard labels, or by what a teacher shows.

  Args:
    module, params: the model.
    batches: as `fit` takes them.
    steps, peak, warmup, decay, weight_decay, clip, b_ratio: of `optimizer.adamw`.
    teacher: None, or (module, params); or a list of several.
    losses: with a teacher, the list of `distillation.losses.parsed`; None is `soft_and_hard()`.
    objective: another loss, as `fit` takes it, and what JSON holds of it; instead of a teacher.
      What it learns itself is in params as `distillation.losses.PROJECTIONS`.
    trainable: a pattern on arrays' names; None is the adapters where there are any, else all. What
      the losses learn themselves trains too.
    folder: where checkpoints and metrics go; None keeps nothing.
    save_every, log_every: steps.
    accumulate, mesh, seed, hooks, stop: of `fit`.

  Returns:
    params, seconds: as `fit`.
  """
  if teacher is None and losses is not None:
    raise InputError('losses without a teacher; give one, or leave them out')
  schedule = dict(steps=steps, peak=peak, warmup=warmup, decay=decay, weight_decay=weight_decay,
                  clip=clip, b_ratio=b_ratio)
  tx = averaged(adamw(**schedule)) if has_averages(params) else adamw(**schedule)
  settings = dict(schedule, accumulate=accumulate)
  trainable = trainable or trained(params) or '.*'
  frozen = {}
  if objective is not None:
    loss, told = objective
    settings |= dict(objective=told)
    if distilled.PROJECTIONS in params:
      trainable = f'{trainable}|{distilled.PROJECTIONS}/.*'
  elif teacher is None:
    loss = _next_token(module)
  else:
    try:                                               # a resume compares it
      text = json.dumps(distilled.soft_and_hard() if losses is None else losses, sort_keys=True)
    except TypeError as error:
      raise InputError(f'losses of more than numbers, strings, lists, dicts: {error}') from error
    teachers, known = zip(*(teacher if isinstance(teacher, list) else [teacher]))
    terms, loss = _distillation(module, teachers, text)
    frozen = dict(teacher_params=known)
    settings |= dict(losses=json.loads(text))
    if learned := distilled.projections(terms, jax.random.key(seed)):
      params = {**params, distilled.PROJECTIONS: learned}
      trainable = f'{trainable}|{distilled.PROJECTIONS}/.*'
  if drops_out(params):
    loss = dropping(loss)
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if folder is not None:
      checkpoints = stack.enter_context(Checkpoints(pathlib.Path(folder, 'checkpoints'),
                                                    every=save_every))
      if jax.process_index() == 0:
        hooks = (*hooks, stack.enter_context(
            Metrics(folder, every=log_every, first=checkpoints.latest() or 0)))
    params, seconds = fit(
        loss, params, batches, tx, steps=steps, trainable=trainable, frozen=frozen, mesh=mesh,
        accumulate=accumulate, seed=seed, hooks=hooks, checkpoints=checkpoints, settings=settings,
        stop=stop)
  return {k: v for k, v in params.items() if k != distilled.PROJECTIONS}, seconds


# The same loss object for the same settings, so that its step is compiled once a process.
_next_token = functools.lru_cache(next_token)


@functools.lru_cache
def _distillation(student, teachers, text):
  """The Terms of a list of losses, as JSON, and the loss of them."""
  terms = distilled.parsed(student.config, tuple(t.config for t in teachers), json.loads(text))
  return terms, distilled.weighted(student, teachers, terms)
