"""The training step of a variant of a config, compiled for devices that are not there."""
import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from lean_jax import methods, tree
from lean_jax.distillation.start import alternating, take_layers
from lean_jax.errors import InputError
from lean_jax.interop import tensors
from lean_jax.interop.hub import local_folder
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import family_of
from lean_jax.pipeline import variants
from lean_jax.report import compiled
from lean_jax.topology import MEMORY
from lean_jax.training import ahead, recipe
from lean_jax.training import mesh as meshes


def plan(config, devices, platform, name=None):
  """What a step takes of each device, by its compiler.

  Args:
    config: a ConfigDict, as experiments/lean_pipeline.py makes.
    devices, platform: of `topology.devices`.
    name: of a variant; None is the last that trains.

  Returns:
    dict: variant, mesh, devices, device, tokens (a step), parameters, trained; fits; limit (bytes
    of a device, where known); seconds (of compiling); operations (of a device, a step, as traced),
    model_operations (of them, of the model alone); replicated, [(array, bytes, axis)]. If it
    compiles: arguments, temporaries, output, alias, total (bytes of a device), collectives,
    {kind: (count, bytes)}. If it does not fit: used, and arguments if the compiler says.

  Raises:
    InputError: no variant of that name trains, or the mesh does not fit it.
  """
  chosen = _chosen(config, name)
  mesh = meshes.make_mesh(**dict(config.mesh), devices=devices)
  made = _made(config, chosen['start'], chosen)
  phase, settings = config.phases[chosen['phase']], dict(config.training)
  rows, length = settings.pop('batch'), config.data.window
  for key in ('save_every', 'log_every', 'on_nonfinite', 'spike'):
    settings.pop(key, None)
  shown, losses = None, None
  if chosen.get('teacher'):
    teacher = _finished(config, chosen['teacher'])
    shown, losses = (teacher[0].module, teacher[1]), variants.losses(config.distillation)
  ready = recipe.prepared(
      made[0].module, made[1], steps=phase.steps, peak=phase.peak, teacher=shown, losses=losses,
      seed=config.seed, **settings)
  began = time.monotonic()
  step, given = ahead.traced(
      ready.loss, ready.params, ready.tx, dict(tokens=((rows, length), jnp.int32)), mesh,
      trainable=ready.trainable, frozen=ready.frozen, accumulate=settings['accumulate'])
  state, rest, frozen = given[:3]
  kind = mesh.devices.flat[0].device_kind
  train, _ = tree.split(made[1], recipe.trained(made[1]) or '.*')
  teachers = [(shown[0].config, shown[1])] if shown else []
  out = dict(
      variant=chosen['name'], mesh={k: n for k, n in mesh.shape.items() if n > 1},
      devices=mesh.size, device=kind, tokens=rows * length, limit=MEMORY.get(kind),
      parameters=tree.parameters(made[1]),
      trained=sum(x.size for x in jax.tree.leaves(train)),
      operations=compiled.operations(step.jaxpr.jaxpr) / mesh.size,
      model_operations=recipe.step_flops(made[0], made[1], train, teachers, rows,
                                         length) / mesh.size,
      replicated=compiled.replicated(dict(zip(
          ('', 'optimizer/', 'frozen/', 'teacher/'), (state.train, state.opt, rest, frozen))),
          mesh))
  with meshes.on(mesh):
    lowered = step.lower(lowering_platforms=(platform,))
  try:
    done = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    why = compiled.explained(error)
    if why is None:
      raise
    return dict(out, fits=False, seconds=time.monotonic() - began, **why)
  m = done.memory_analysis()
  total = (m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
           - m.alias_size_in_bytes)
  return dict(out, fits=out['limit'] is None or total <= out['limit'],
              seconds=time.monotonic() - began, arguments=m.argument_size_in_bytes,
              temporaries=m.temp_size_in_bytes, output=m.output_size_in_bytes,
              alias=m.alias_size_in_bytes, total=total,
              collectives=compiled.collectives(done.as_text()))


def advice(found):
  """What to change so that a plan fits, in a sentence."""
  spare = found.get('arguments', 0) > .7 * (found['limit'] or math.inf)
  if spare:
    return ('the weights, their optimizer and the teacher alone fill the device: share them over '
            'more devices (mesh.fsdp, or a larger slice), or keep them in fewer bits')
  return ('what a step computes is too large: fewer rows a device (training.batch, or '
          'training.accumulate, that keeps the batch), a shorter data.window, model.remat, or '
          'mesh.sequence or mesh.tensor')


def _chosen(config, name):
  trains = [dict(v) for v in config.variants if v.get('phase')]
  found = [v for v in trains if name in (None, v['name'])]
  if not found:
    raise InputError(f'no variant {name!r} that trains; there are: '
                     f'{", ".join(v["name"] for v in trains) or "none"}')
  return found[-1]


def _made(config, start, variant):
  """(config, shapes) of a variant as its training begins."""
  names = [v['name'] for v in config.variants]
  if start in names and start != variant['name']:
    made, shapes = _finished(config, start)
    keep = variant.get('keep')
    if keep is not None:
      count = made.layers // 2 if keep == 'half' else keep
      taken = []

      def take(params):
        smaller, params = take_layers(made, params, alternating(made.layers, count))
        taken.append(smaller)
        return params
      shapes, made = jax.eval_shape(take, shapes), taken[-1]
  else:
    made = variants.fresh(variant, _teacher(config)) if start != 'teacher' else _teacher(config)
    shapes = jax.eval_shape(lambda: made.module.init(
        jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))['params']
  made, shapes = variants.cast(variant, made, shapes)
  return made, _applied(variant.get('methods', ()), shapes)


def _finished(config, name):
  variant = next(dict(v) for v in config.variants if v['name'] == name)
  made, shapes = _made(config, variant['start'], variant)
  return made, _applied(variant.get('finish', ()), shapes)


def _applied(steps, shapes):
  if not steps:
    return shapes
  return jax.eval_shape(lambda p: methods.apply(p, steps, jax.random.key(0)), shapes)


def _teacher(config):
  """The DecoderConfig of the teacher: of its folder's config.json, or the config's own."""
  window = config.data.window
  if not config.teacher:
    return DecoderConfig(vocabulary=config.tokenizer.vocabulary, context=window,
                         **dict(config.model))
  found = tensors.read_json(local_folder(config.teacher) / 'config.json')
  made = family_of(found).from_hf(found)
  if window > made.context:
    raise InputError(f'data.window is {window} tokens, the teacher reads {made.context} at most; '
                     'lower --config.data.window')
  return dataclasses.replace(made, dtype=config.model.dtype, remat=config.model.remat)
