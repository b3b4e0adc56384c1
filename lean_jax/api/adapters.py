"""Adapters: attached, saved, several over one base, merged."""
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lean_jax import methods, tree
from lean_jax.adapters import beside, ia3, several
from lean_jax.adapters.combine import combined
from lean_jax.adapters.lora import sides
from lean_jax.adapters.peft import load_peft, save_peft
from lean_jax.adapters.requantize import requantize as merged_again
from lean_jax.api.model import Model
from lean_jax.calibration.quantize import MATRICES
from lean_jax.errors import InputError

ADAPTERS = ('lora', 'dora', 'vera', 'pissa', 'ia3', *beside.METHODS)


def attach_lora(model: Model, *, rank: int = 8, alpha: float = 16., where: str = MATRICES,
                seed: int = 0, **settings) -> Model:
  """The model with trainable low-rank adapters on its matrices; over a quantized model, QLoRA.

  Args:
    settings: `rules`, and scaling and dropout of `adapters.lora`.
  """
  return attach(model, 'lora', where=where, seed=seed, rank=rank, alpha=alpha, **settings)


def attach(model: Model, method: str, *, where: str | None = None,
           rules: Sequence[tuple[str, Mapping[str, Any]]] = (), seed: int = 0,
           **settings) -> Model:
  """The model with adapters that train, its weights of whatever kind under them.

  Args:
    method: 'lora', 'dora', 'vera', 'pissa' or 'ia3', of the file of that name in `adapters`; or of
      `adapters.beside`, which have no `where` and no rules: bottlenecks 'houlsby', 'pfeiffer',
      'parallel'; keys and values before every text, 'prefix' and 'p_tuning_v2'; 'prompt'.
    where: a regular expression on the weights' whole names; None is the matrices of all layers, or
      for 'ia3' its paper's places.
    rules: [(such an expression, settings)] of weights that are adapted otherwise: ('.*/down/.*',
      dict(rank=16)); the first that matches a weight is the one.
    seed: of what is drawn at random.
    settings: of the method.

  Raises:
    InputError: no such method or setting, one out of range, or an expression that matches nothing.
  """
  if method not in ADAPTERS:
    raise InputError(f'no adapter {method!r}; there are: {", ".join(ADAPTERS)}')
  if method in beside.METHODS:
    if where is not None or rules:
      raise InputError(f'{method!r} is on no weights; leave where and rules out')
    return dataclasses.replace(model, params=beside.attached(
        model.config, model.params, method, settings, jax.random.key(seed)))
  last = ia3.PLACES if method == 'ia3' and where is None and 'side' not in settings else (
      (where or MATRICES, {}),)
  steps = [dict(settings, **own, where=name, method=method) for name, own in (*rules, *last)]
  if method == 'vera':
    steps = [dict(inputs=_most_inputs(model, steps)) | dict(seed=seed) | step for step in steps]
  return _apply(model, *steps, seed=seed)


def save_adapter(model: Model, folder, *, overwrite: bool = False):
  """Writes a model's adapters alone, as the PEFT library has them, to a new folder.

  `peft.PeftModel.from_pretrained(base, folder)` loads them: LoRA, DoRA, VeRA and IA3; a prefix,
  without the MLP that made it; a prompt. What a checkpoint has fused (GPT-2's queries, keys and
  values) has no VeRA there, and experts have LoRA alone. The base's fingerprint is recorded.

  Args:
    overwrite: whether adapters that are there may be replaced.

  Raises:
    InputError: there are no adapters, or some that these files have no words for; the folder
      exists, or cannot be written.
  """
  save_peft(folder, model.family, model.config, model.params, overwrite=overwrite)


def load_adapter(model: Model, folder) -> Model:
  """The model with the adapters of a folder of `save_adapter` or of the PEFT library.

  Raises:
    InputError: a file is missing or damaged, the adapter computes what we do not, it was made for
      another base, or the model has adapters already.
  """
  return dataclasses.replace(
      model, params=load_peft(folder, model.family, model.config, model.params))


def together(adapted: Mapping[str, Model]) -> Model:
  """One base with the LoRA adapters of several models over it, by name; the first is in use.

  Memory is the base once, and the adapters, each of the largest rank. `use` switches. A model that
  has several already brings them along, by their own names.

  Raises:
    InputError: none are given, two of one name, adapters other than LoRA, or over another base.
  """
  params = several.together({name: model.params for name, model in adapted.items()})
  return dataclasses.replace(next(iter(adapted.values())), params=params)


def combine(adapted: Mapping[str, Model], method: str = 'svd', *,
            weights: Sequence[float] | Mapping[str, float] | None = None,
            density: float | None = None, rank: int | None = None, seed: int = 0) -> Model:
  """One base with one LoRA adapter that is made of those of several models.

  Args:
    method: 'cat' (exact: ranks add up), 'svd', 'linear', 'magnitude_prune', 'ties', 'dare_linear',
      'dare_ties', and these with '_svd': see `adapters.combine`.
    weights: one each, or {name: weight}; None is 1 / their count, or 1 for ties.
    density: the part of the numbers that is kept, of methods that drop some.
    rank: of the result, of 'svd'; None is the greatest of theirs.
    seed: of what 'dare' drops.

  Raises:
    InputError: no such method or setting, ranks that differ for a method that works on factors,
      other adapters than LoRA, or another base.
  """
  params = combined({name: model.params for name, model in adapted.items()}, method,
                    weights=weights, density=density, rank=rank, key=jax.random.key(seed))
  return dataclasses.replace(next(iter(adapted.values())), params=params)


def use(model: Model, adapter: str | Sequence[str | None] | None) -> Model:
  """The model with another of its adapters in use, without copying or compiling anything.

  Args:
    adapter: a name, or None for the base alone; or one for each row of a batch, of a model without
      experts: with more rows than names, as many rows after each other use each.

  Raises:
    InputError: there is no such adapter, or there are none to choose from.
  """
  return dataclasses.replace(model, params=several.use(model.params, adapter))


def merge(model: Model) -> Model:
  """The model with its adapters merged into dense weights; what stands beside them stays."""
  return _apply(model, dict(where='.*', method='merge'))


def requantize(model: Model) -> tuple[Model, dict[str, float]]:
  """The model with its adapters merged into its rounded weights, and what that lost.

  Returns:
    The model, and {name: |merged - rounded| / |merged|} of each weight that had an adapter.

  Raises:
    InputError: it has none, or one on a weight that is not rounded: see `merge`.
  """
  params, errors = merged_again(model.params)
  return dataclasses.replace(model, params=params), errors


def _most_inputs(model, steps):
  """Of the widest weight that one of the steps is for."""
  found = tree.matched(model.params, [(step['where'], methods) for step in steps])
  weights = tree.named_weights(model.params)
  return max(math.prod(sides(weights[name])[1]) for name in found)


def _apply(model, *steps, seed=0):
  params = methods.apply(model.params, steps, jax.random.key(seed))
  return dataclasses.replace(model, params=params)
