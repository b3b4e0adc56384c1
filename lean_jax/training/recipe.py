"""Training a model from settings: which loss, which optimizer, where the state is kept."""
import contextlib
import functools
import pathlib

import jax

from lean_jax.adapters.dropout import dropping, drops_out
from lean_jax.adapters.trained import trained
from lean_jax.distillation.soft_labels import distillation
from lean_jax.errors import InputError
from lean_jax.objectives.language_modeling import next_token
from lean_jax.quantization.ema import averaged, has_averages
from lean_jax.training.checkpoint import Checkpoints
from lean_jax.training.loop import fit
from lean_jax.training.metrics import Metrics
from lean_jax.training.optimizer import adamw


def train(module, params, batches, *, steps, peak, warmup=0, decay='cosine', weight_decay=0.,
          clip=1., b_ratio=1., accumulate=1, teacher=None, temperature=2., soft_weight=.5,
          trainable=None, mesh=None, seed=0, folder=None, save_every=200, log_every=10, hooks=(),
          stop=lambda: False):
  """Trains by hard labels, or by a teacher's soft ones too.

  Args:
    module, params: the model.
    batches: as `fit` takes them.
    steps, peak, warmup, decay, weight_decay, clip, b_ratio: of `optimizer.adamw`.
    teacher: None, or (module, params) with the same vocabulary.
    temperature, soft_weight: of `soft_labels.distillation`; without a teacher unused.
    trainable: a pattern on arrays' names; None is the adapters where there are any, else all.
    folder: where checkpoints and metrics go; None keeps nothing.
    save_every, log_every: steps.
    accumulate, mesh, seed, hooks, stop: of `fit`.

  Returns:
    params, seconds: as `fit`.
  """
  if teacher is not None and teacher[0].config.vocabulary != module.config.vocabulary:
    raise InputError(f'the teacher has a vocabulary of {teacher[0].config.vocabulary} and the '
                     f'student of {module.config.vocabulary}; soft labels need the same tokenizer')
  schedule = dict(steps=steps, peak=peak, warmup=warmup, decay=decay, weight_decay=weight_decay,
                  clip=clip, b_ratio=b_ratio)
  tx = averaged(adamw(**schedule)) if has_averages(params) else adamw(**schedule)
  settings = dict(schedule, accumulate=accumulate)
  frozen = {}
  if teacher is None:
    loss = _next_token(module)
  else:
    loss = _distillation(module, teacher[0], temperature, soft_weight)
    frozen = dict(teacher_params=teacher[1])
    settings |= dict(temperature=temperature, soft_weight=soft_weight)
  if drops_out(params):
    loss = dropping(loss)
  trainable = trainable or trained(params) or '.*'
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if folder is not None:
      checkpoints = stack.enter_context(Checkpoints(pathlib.Path(folder, 'checkpoints'),
                                                    every=save_every))
      if jax.process_index() == 0:
        hooks = (*hooks, stack.enter_context(
            Metrics(folder, every=log_every, first=checkpoints.latest() or 0)))
    return fit(loss, params, batches, tx, steps=steps, trainable=trainable, frozen=frozen,
               mesh=mesh, accumulate=accumulate, seed=seed, hooks=hooks, checkpoints=checkpoints,
               settings=settings, stop=stop)


# The same loss object for the same settings, so that its step is compiled once a process.
_next_token = functools.lru_cache(next_token)
_distillation = functools.lru_cache(
    lambda student, teacher, temperature, soft_weight: distillation(
        student, teacher, temperature=temperature, soft_weight=soft_weight))
