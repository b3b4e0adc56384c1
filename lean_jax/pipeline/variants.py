"""How a variant of a model comes about: a start, methods, training, methods after it."""
import dataclasses

import jax
import jax.numpy as jnp

from lean_jax.adapters import requantize
from lean_jax.api import Model
from lean_jax.calibration.steps import apply
from lean_jax.calibration.text import of_windows
from lean_jax.data.batches import Batches
from lean_jax.distillation.losses import soft_and_hard
from lean_jax.distillation.start import evenly
from lean_jax.distillation.written import written
from lean_jax.errors import InputError
from lean_jax.models.decoder import Decoder
from lean_jax.models.families import FAMILIES
from lean_jax.report import progress
from lean_jax.training import recipe

SAMPLES, BATCH = 64, 8         # training windows that methods are calibrated on


def begin(variant, models, teacher, tokenizer, seed):
  """The model that a variant starts from; args as of `_begun`."""
  model = _begun(variant, models, teacher, tokenizer, seed)
  config, params = cast(variant, model.config, model.params)
  return dataclasses.replace(model, config=config, params=params)


def cast(variant, config, params):
  """(config, params) with the variant's `dtype`, if it has one; of arrays or of shapes."""
  dtype = variant.get('dtype')
  if dtype is None:
    return config, params
  one = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
  each = one if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)) else (
      lambda x: jax.eval_shape(one, x))
  return dataclasses.replace(config, dtype=dtype), jax.tree.map(each, params)


def _begun(variant, models, teacher, tokenizer, seed):
  """The model that a variant starts from.

  Args:
    variant: dict with `start`: 'teacher' on the first variant (the loaded one, or a fresh one),
      'random' (a fresh one of the teacher's shape), or an earlier variant's name; `keep`, 'half' or
      a number of layers; with a random start `model`, what of its config is otherwise; and `dtype`,
      which its weights and activations are brought to.
    models: {name: Model} of the variants so far.
    teacher: a Model, or the DecoderConfig of one to train.
  """
  start, keep = variant['start'], variant.get('keep')
  if start in models:
    model = models[start]
    return model if keep is None else evenly(model, _layers(model.config, keep))
  if start == 'teacher' and isinstance(teacher, Model):
    return teacher
  if start not in ('teacher', 'random'):
    raise InputError(f"variant {variant['name']!r} starts from {start!r}; expected 'random' or an "
                     f"earlier variant: {', '.join(models) or 'none yet'}")
  config = fresh(variant, teacher.config if isinstance(teacher, Model) else teacher)
  tokens = jnp.zeros((1, 8), jnp.int32)
  params = jax.jit(Decoder(config).init)(jax.random.key(seed), tokens)['params']
  return Model(FAMILIES['llama'], config, params, tokenizer)


def fresh(variant, teacher):
  """The config of a variant that starts at random, from that of the teacher."""
  config = dataclasses.replace(teacher, **dict(variant.get('model') or {}))
  keep = variant.get('keep')
  return config if keep is None else dataclasses.replace(config, layers=_layers(config, keep))


def make(variant, model, models, windows, c, mesh, folder, bars, stop, profile=None):
  """A variant from its start: methods, training, methods.

  Returns:
    The Model, and the seconds of training.
  """
  key = jax.random.key(c.seed + 1)
  batches = lambda: of_windows(windows['main'], SAMPLES, BATCH)
  applied = lambda model, steps: dataclasses.replace(model, params=apply(
      model.config, model.params, variant.get(steps, ()), batches, key))
  model = applied(model, 'methods')
  seconds = 0.
  if variant.get('phase'):
    phase, settings = c.phases[variant['phase']], dict(c.training)
    batch = settings.pop('batch')
    teacher = models[variant['teacher']] if variant.get('teacher') else None
    batches = Batches(_data(variant, windows, teacher, c), batch, c.seed)
    shown = teacher and (teacher.module, teacher.params)
    rates = recipe.rates_of(model.module, model.params, batches, None, shown, mesh, phase.steps)
    with bars.bar(f'train {variant["name"]}', phase.steps) as update:
      params, seconds = recipe.train(
          model.module, model.params, batches, steps=phase.steps, peak=phase.peak, teacher=shown,
          losses=losses(c.distillation) if teacher else None,
          on_policy=_on_policy(c.distillation, teacher), mesh=mesh, seed=c.seed, folder=folder,
          stop=stop, profile=profile, hooks=(progress.training(update, rates),), **settings)
    model = dataclasses.replace(model, params=params)
  done = applied(model, 'finish')
  _tell_merged(variant, model.params, done.params, bars)
  return done, seconds


def losses(c):
  """The list of losses of a config: `losses`, or the temperature and soft_weight of two."""
  return c.losses if 'losses' in c else soft_and_hard(
      **{k: v for k, v in c.items() if k != 'on_policy'})


def _on_policy(c, teacher):
  """The settings of a config's `on_policy`; None without, or without a teacher."""
  if teacher is None or 'on_policy' not in c:
    return None
  return dict(c.on_policy, ends=list(teacher.tokenizer.ends))


def _tell_merged(variant, before, after, bars):
  """A line of what merging adapters into integers lost."""
  merges = any(step['method'] == 'requantize_lora' for step in variant.get('finish', ()))
  if lost := merges and requantize.merging_errors(before, after):
    most = max(lost, key=lost.get)
    bars.line(f'{variant["name"]} merged', f'{lost[most]:.2%} of {most} lost, the most of '
              f'{len(lost)} weights')


def _data(variant, windows, teacher, c):
  """The windows that a variant trains on: those of a corpus, or 'written' by its teacher."""
  name = variant.get('data', 'main')
  if name != 'written':
    return windows[name]
  if teacher is None:
    raise InputError(f"variant {variant['name']!r} trains on what its teacher writes, and has "
                     'none; give it a teacher')
  return written(teacher, c.written, length=c.data.window, seed=c.seed)


def _layers(config, keep):
  return config.layers // 2 if keep == 'half' else keep
