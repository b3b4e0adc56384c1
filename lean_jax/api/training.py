"""Training on text, and on examples with answers."""
import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

from lean_jax.api.adapters import attach
from lean_jax.api.model import Model
from lean_jax.calibration.quantize import quantize
from lean_jax.data.batches import Batches
from lean_jax.data.example_windows import ExampleWindows
from lean_jax.data.packed import packed_windows
from lean_jax.distillation.cache import Cache, open_cache
from lean_jax.distillation.elsewhere import Elsewhere
from lean_jax.errors import InputError
from lean_jax.training import finetune as tuning
from lean_jax.training import recipe


def train(model: Model, data, *, steps: int, batch: int = 16, peak: float = 1e-3,
          window: int | None = None, seed: int = 0, workdir=None, field: str = 'text',
          cache=None, **settings) -> Model:
  """Trains on text: the adapters if the model has any, else all of it.

  Args:
    data: a path (see `data.sources.open_source`), a Source, or Windows; or ExampleWindows, of
      `completions` say.
    window: tokens a window; None is the model's context, at most 512.
    workdir: where checkpoints and metrics go; the same call goes on from what is there.
    cache: a folder of `cache_teacher`, or its Cache: the losses then look at the labels in it; or
      a `distillation.elsewhere.Elsewhere`, which makes them.
    settings: of `training.recipe.train`: warmup, weight_decay, trainable, hooks, mesh, ...
  """
  if cache is not None and not isinstance(cache, (Cache, Elsewhere)):
    cache = open_cache(cache)
  with _batches(model, data, batch, seed, window, field, cache) as batches:
    params, _ = recipe.train(model.module, model.params, batches, steps=steps, peak=peak, seed=seed,
                             folder=workdir, cached=cache is not None, **settings)
  return dataclasses.replace(model, params=params)


def finetune(model: Model, data, *, method: str = 'qlora',
             adapter: Mapping[str, Any] | None = None, epochs: float = 3.,
             steps: int | None = None, batch: int = 8, peak: float | None = None,
             window: int | None = None, packing: bool | None = None, template: str | None = None,
             seed: int = 0, workdir=None, **settings) -> Model:
  """The model trained to answer as examples do; the loss is on the answers only.

  Examples are conversations (`messages`), instructions (`instruction`, `input`, `output`) or texts
  (`text`): see `data.examples`. Several share a row and do not see each other. Those of an encoder
  and a decoder are instructions or pairs (`source`, `target`), one a row: see
  `data.source_windows`.

  Args:
    data: the path of a .jsonl file or of a folder of them, a list of records, or windows of
      `training.finetune.example_windows`.
    method: of `training.finetune.TUNINGS`: 'qlora' rounds a float model to nf4-g64-dq first;
      'lora', 'dora', 'vera', 'pissa', 'ia3', 'bitfit', 'full'.
    adapter: settings of `attach`: rank, alpha, where, rules, dropout, ...
    epochs: how often every example is seen; steps instead says how many steps there are.
    batch: rows a step, as many as there are at most.
    peak: the greatest learning rate; None is the method's usual one.
    window: tokens a row, or of a source and of a target each; None is the model's context, at most
      2048.
    packing: whether examples share rows; None where the model can keep them apart.
    template: of conversations, a name or Jinja; None is the tokenizer's.
    workdir: where checkpoints and metrics go; the same call goes on from what is there.
    settings: of `training.recipe.train`: warmup, weight_decay, b_ratio, hooks, mesh, ...

  Raises:
    InputError: data that cannot be used, with its line; or a method that does not fit the model.
  """
  windows = tuning.example_windows(model, data, window=window, packing=packing, template=template)
  return follow(begin(model, method, adapter, seed), windows, method=method, epochs=epochs,
                steps=steps, batch=batch, peak=peak, seed=seed, workdir=workdir, **settings)


def begin(model: Model, method: str, adapter: Mapping[str, Any] | None = None,
          seed: int = 0) -> Model:
  """The model as `finetune` begins to train it: adapted, and rounded if the method says so."""
  how = tuning.tuning(method, model.params)
  if how.attach is None:
    if adapter:
      raise InputError(f'method {method!r} has no adapter, and settings of one are given: '
                       f'{", ".join(adapter)}; leave them out')
    return model
  if method == 'qlora' and not tuning.is_rounded(model.params):
    try:
      model = quantize(model, tuning.QLORA)
    except InputError as error:
      raise InputError(f'qlora: {error}: lean.quantize the model first, and it is taken as it is'
                       ) from error
  return attach(model, how.attach, seed=seed, **{**how.settings, **(adapter or {})})


def follow(model: Model, windows, *, method: str, epochs: float = 3., steps: int | None = None,
           batch: int = 8, peak: float | None = None, seed: int = 0, workdir=None,
           **settings) -> Model:
  """The model that `begin` gave, trained on windows; args as of `finetune`."""
  how, batch = tuning.TUNINGS[method], min(batch, len(windows))
  batches = Batches(windows, batch, seed)
  params, _ = recipe.train(
      model.module, model.params, batches, steps=steps or tuning.steps_of(windows, batch, epochs),
      peak=how.peak if peak is None else peak, seed=seed, folder=workdir, trainable=how.trainable,
      **settings)
  return dataclasses.replace(model, params=params)


@contextlib.contextmanager
def _batches(model, data, batch, seed, window, field, cache):
  """What `train` learns from, for as long as the block lasts."""
  if isinstance(data, ExampleWindows):
    if window is not None or cache is not None:
      raise InputError('completions with a window, a cache or a teacher_mesh; they have a length '
                       'of their own, and labels are of text alone: leave these out')
    yield Batches(data, batch, seed)
    return
  window = window or getattr(cache, 'length', None) or min(model.config.context, 512)
  with packed_windows(data, 'train', model, window, field) as windows:
    batches = Batches(windows, batch, seed)
    yield batches if cache is None else cache.labelled(batches, model)
