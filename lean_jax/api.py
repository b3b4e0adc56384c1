"""Models as people use them: thin calls of the pure functions below."""
import contextlib
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import methods, tree
from lean_jax.adapters import beside, ia3, several
from lean_jax.adapters.combine import combined
from lean_jax.adapters.lora import sides
from lean_jax.adapters.peft import load_peft, save_peft
from lean_jax.adapters.requantize import requantize as merged_again
from lean_jax.adapters.trained import trained_with
from lean_jax.calibration.quantize import MATRICES, quantize
from lean_jax.calibration.text import of_windows
from lean_jax.data import labelled
from lean_jax.data.batches import Batches
from lean_jax.data.packed import check_reads_text, packed_windows
from lean_jax.data.paired import paired_windows
from lean_jax.data.tokenizer import Tokenizer, load_tokenizer
from lean_jax.distillation import federated, labelling, narrow, vectors
from lean_jax.distillation.cache import (
  Cache,
  LabelledBatches,
  check_labels,
  check_teachers,
  open_cache,
  write_cache,
)
from lean_jax.distillation.classes import classes
from lean_jax.distillation.completions import Completions, completions  # noqa: F401, the latter
from lean_jax.distillation.generated import write_data  # noqa: F401, of this interface
from lean_jax.distillation.losses import PROJECTIONS, check_tokenizers, soft_and_hard
from lean_jax.distillation.start import evenly
from lean_jax.errors import InputError
from lean_jax.evaluation import retrieval
from lean_jax.evaluation import texts as texts_in
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.evaluation.retrieval import pooling_of
from lean_jax.files import occupied, replace_folder
from lean_jax.generation.caches import with_cache
from lean_jax.generation.text import generate
from lean_jax.interop import formats, gguf, gguf_write, hf, sentence, tensors
from lean_jax.interop.hub import local_folder
from lean_jax.models import fresh
from lean_jax.models.families import Family, family_of
from lean_jax.models.segments import configured, converted
from lean_jax.models.stack import StackConfig
from lean_jax.objectives.forward import forward
from lean_jax.quantization import mixed, rotation
from lean_jax.report.progress import Bars
from lean_jax.training import finetune as tuning
from lean_jax.training import mesh as meshes
from lean_jax.training import recipe
from lean_jax.training.checkpoint import load_model, save_model
from lean_jax.training.stored import spread
from lean_jax.weights.beside import refuse_beside
from lean_jax.weights.prepared import refuse_prepared

ADAPTERS = ('lora', 'dora', 'vera', 'pissa', 'ia3', *beside.METHODS)
FORMATS = ('lean', 'hf', 'gguf', *formats.FORMATS)
STARTS = ('alternating', 'importance', 'random')       # of a student


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A model: what it is, what it knows, and how it reads.

  Attributes:
    family: which Hugging Face architecture it is.
    config: its hyper-parameters.
    params: its tree of weights.
    tokenizer: text to ids and back.
    hf_config: config.json as it was loaded; {} for a model made here.
  """
  family: Family
  config: StackConfig
  params: Any
  tokenizer: Tokenizer
  hf_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def module(self):
    """The Linen module: `module.apply({'params': params}, tokens)` gives logits."""
    return self.config.module

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of the classes of `classify`; none for a model that does not classify."""
    return getattr(self.config, 'labels', ())

  def logits(self, tokens, mask=None, *, decoder_tokens=None, token_types=None) -> jax.Array:
    """Logits of the token after each, [B T V] float32; of an encoder, what its head gives.

    Args:
      tokens: [B T]; the source, where the model is an encoder and a decoder.
      mask: [B T], which tokens are real; None for all.
      token_types: [B T], of an encoder, which text of a pair each token is of; None is the first.
      decoder_tokens: [B U], the target of such a model, its start token first. The logits are of
        the token after each of these.

    Raises:
      InputError: decoder_tokens are given to another model, or not to such a one; or token_types
        to a model that has none.
    """
    if token_types is not None and not getattr(self.config, 'token_types', 0):
      raise InputError(f'a {self.family.model_type} has no token_types; give tokens alone')
    wanted = 'decoder_tokens' in self.module.inputs
    if wanted != (decoder_tokens is not None):
      raise InputError(f'a {self.family.model_type} needs decoder_tokens, the target; give them'
                       if wanted else f'a {self.family.model_type} has no decoder_tokens; give '
                       'tokens alone')
    batch = dict(tokens=tokens, decoder_tokens=decoder_tokens, token_types=token_types)
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items() if v is not None}
    if mask is not None:
      batch['mask'] = jnp.asarray(mask, bool)
    with meshes.of(self.params):
      return _logits(self.module, self.params, batch)

  def embed(self, texts: Sequence[str], *, batch: int = 32,
            truncate: bool | None = None) -> np.ndarray:
    """The vector of each text, [n D] float32: see `evaluation.texts.embed`.

    A sentence encoder's is pooled as it was trained to be, and normalised if it was; a longer text
    than it reads is cut, as sentence-transformers does. Of another model it is the mean of the last
    hidden states, and a text that is too long is an error unless truncate=True.
    """
    return texts_in.embed(self.module, self.params, self.tokenizer, texts, batch=batch,
                          truncate=truncate)

  def classify(self, texts: Sequence[str | tuple[str, str]], *, batch: int = 32,
               truncate: bool = False) -> np.ndarray:
    """Logits of `labels` of each text or pair of texts, [n labels] float32.

    Raises:
      InputError: the model has no head of sequences; a text longer than the context, without
        truncate.
    """
    return texts_in.classify(self.module, self.params, self.tokenizer, texts, batch=batch,
                             truncate=truncate)

  def tag(self, sentences: Sequence[Sequence[str]], *, batch: int = 32,
          truncate: bool = False) -> list[np.ndarray]:
    """Logits of `labels` of each word of each list of words: see `evaluation.texts.tag`."""
    return texts_in.tag(self.module, self.params, self.tokenizer, sentences, batch=batch,
                        truncate=truncate)

  def generate(self, prompt, **settings) -> Any:
    """The prompt and what follows it, or an answer: `generate` says what of."""
    return generate(self, prompt, **settings)


def load(folder, *, dtype: str | None = None, scan_layers: bool | None = None,
         mesh: jax.sharding.Mesh | None = None) -> Model:
  """A model from a folder that `save` made or of a Hugging Face checkpoint, or from a GGUF file.

  A checkpoint is read a block at a time, each array to where it will live. Warns of tensors with a
  NaN or an infinity.

  Args:
    folder: a path; or 'organization/name', a model of the Hugging Face hub, '@revision' after it if
      not its main one: from the hub's cache, or fetched; or a GGUF file, or a folder with one and
      no config.json, of a Llama, Mistral or Qwen2. What a GGUF file or a format of
      `interop.formats` rounds stays rounded.
    dtype: of a checkpoint's parameters and activations: 'float32' (None), 'bfloat16'
      or 'float16'. A saved model keeps its own, and refuses another.
    scan_layers: whether layers of one kind are stacked, which compiles one for all, or each is
      written out; None stacks those of a checkpoint, if they are rounded alike, and leaves a saved
      model's as they are.
    mesh: of `training.mesh.make_mesh`: each device reads and holds its part of each array. None is
      one device.

  Raises:
    InputError: no such folder, an architecture that is not supported, a corrupt or missing file, or
      the hub cannot be reached.
  """
  file = gguf.file_in(folder)
  folder = local_folder(folder) if file is None else file
  shardings = None if mesh is None else lambda like: meshes.shardings(like, mesh)
  if file is not None:
    family, config, params, tokenizer, hf_config = gguf.load_gguf(
        file, dtype=dtype, scan_layers=scan_layers, shardings=None if mesh is None else (
            lambda params: meshes.shardings(params, mesh)))
    return Model(family, config, params, tokenizer, hf_config)
  if (folder / 'lean.json').exists():
    if dtype is not None:
      raise InputError(f'{folder} was saved by lean_jax with its own dtypes; load it without dtype')
    hf_config = tensors.read_json(folder / 'config.json')
    family = family_of(hf_config)
    config = family.from_hf(hf_config)
    params, meta = load_model(folder, shardings=shardings)
    config = configured(config, **meta['local'])
    _check_described(folder, config, params)
    if scan_layers is not None:
      config, params = converted(config, params, scan_layers)
  else:
    family, config, params, hf_config = hf.load_hf(
        folder, dtype=dtype, scan_layers=scan_layers, shardings=shardings)
  config = configured(config, pooling=sentence.pooling(folder))
  tokenizer = load_tokenizer(folder)
  if tokenizer.size > config.vocabulary:
    raise InputError(f'{folder}: the tokenizer has {tokenizer.size} tokens, the model '
                     f'{config.vocabulary}; use the tokenizer that the model was made with')
  return Model(family, config, params, tokenizer, hf_config)


def scan_layers(model: Model, scan: bool = True) -> Model:
  """The model with its layers of one kind stacked, or each written out: every value as it was."""
  config, params = converted(model.config, model.params, scan)
  return dataclasses.replace(model, config=config, params=params)


def save(model: Model, folder, *, format: str = 'lean', overwrite: bool = False,
         extra: Mapping[str, str] | None = None, max_shard_size: int | str = '5GB',
         encoding: str | None = None):
  """Writes a model to a new folder, or to a GGUF file, whole or not at all.

  Args:
    format: 'lean' keeps every weight as it is, with a digest of each that `load` verifies; 'hf'
      writes the dense value of each, in its dtype, which `transformers` loads; the formats of
      `interop.formats` ('compressed-tensors', ...) write rounded weights as these have them, which
      it loads too; 'gguf' writes a Llama, Mistral or Qwen2 with its tokenizer to a file, which
      llama.cpp loads.
    overwrite: whether the folder or file may exist; the old one is replaced in the end.
    extra: {file name: text} to go with it.
    max_shard_size: of a safetensors file for `transformers`, in bytes or like '300MB'; a larger
      model is in several files, with an index.
    encoding: of the matrices of format 'gguf': 'F16' (None), 'F32', 'Q8_0', 'Q4_0', 'Q4_1',
      'Q5_0', 'Q5_1', 'MXFP4', 'Q4_K' or 'Q6_K'.

  Raises:
    InputError: the folder exists, the disk is full, there is no such format, or it has no words for
      this model.
  """
  if format not in FORMATS:
    raise InputError(f'no format {format!r}; there are: {", ".join(FORMATS)}')
  refuse_prepared(model.params)
  if format != 'lean':
    refuse_beside(model.params, f'written as {format}')
  if format != 'lean' and spread(model.params):
    raise InputError(f'format {format!r} of a model that is spread over several hosts; save it as '
                     "'lean', and write that in another format on one")
  if format == 'gguf':
    if extra:
      raise InputError('a GGUF file has no other files in it; leave extra out')
    gguf_write.save_gguf(folder, model.family, model.config, model.params, model.tokenizer,
                         encoding=encoding or 'F16', overwrite=overwrite)
    return
  form = formats.FORMATS.get(format)
  if encoding is not None and encoding not in getattr(form, 'ENCODINGS', ()):
    raise InputError(f'encoding {encoding!r} of format {format!r}; it has: '
                     f'{", ".join(getattr(form, "ENCODINGS", ())) or "none"}')

  def rest(new):
    model.tokenizer.save(new, types=getattr(model.config, 'token_types', 0) > 1)
    sentence.write(new, model.config)
    for name, text in (extra or {}).items():
      pathlib.Path(new, name).write_text(text, encoding='utf-8')

  if format == 'hf' or form is not None:
    if overwrite and occupied(folder) and not pathlib.Path(folder, 'config.json').exists():
      raise InputError(f'{folder} holds no model, so it is not overwritten; name another')
    with replace_folder(folder, overwrite=overwrite) as new:
      hf.save_hf(new, model.family, model.config, model.params, model.hf_config,
                 max_shard_size=max_shard_size, form=form, encoding=encoding)
      rest(new)
    return

  def beside(new):
    hf.write_config(new, model.family, model.config, model.hf_config)
    rest(new)
  local = {k: getattr(model.config, k) for k in ('dtype', 'remat', 'scan_layers')}
  save_model(folder, model.params, dict(local=local), overwrite=overwrite, beside=beside)


def create(like: str | Mapping[str, Any] | Model, tokenizer: Tokenizer | None = None, *,
           seed: int = 0, dtype: str | None = None, **settings) -> Model:
  """A model that knows nothing yet, its weights drawn as its blocks draw them.

  `create('mamba', teacher.tokenizer, hidden_size=64, num_hidden_layers=2)`, or, like its teacher
  but new, `create(teacher, seed=1)`.

  Args:
    like: a family's model_type, a config.json, or a model.
    tokenizer: how it reads; a model's own where like is one. The vocabulary has its size.
    seed: of the weights.
    dtype: of activations and products; None is a model's own, or 'float32'.
    settings: keys of config.json in place of those of `like`; what neither says is as
      `transformers` has it.

  Raises:
    InputError: no such family or key, a value that cannot be, or fewer tokens than the
      tokenizer has.
  """
  of = like if isinstance(like, Model) else None
  tokenizer = of.tokenizer if tokenizer is None and of is not None else tokenizer
  if tokenizer is None:
    raise InputError('no tokenizer; give one, the teacher.tokenizer say')
  hf: dict[str, Any] = (
      like.family.to_hf(like.config) if isinstance(like, Model) else dict(model_type=like)
      if isinstance(like, str) else dict(like))
  hf = {'vocab_size': tokenizer.size} | hf | settings
  family, config = fresh.described(hf, hf.keys() - {'model_type'} if of is None else settings)
  if of is not None:
    kept = {k: getattr(of.config, k) for k in ('dtype', 'remat', 'scan_layers', 'pooling')}
    config = configured(config, **kept) if settings else of.config
  config = configured(config, dtype=dtype) if dtype else config
  if tokenizer.size > config.vocabulary:
    raise InputError(f'vocab_size {config.vocabulary} and a tokenizer of {tokenizer.size} tokens; '
                     'give at least that')
  ids = dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
  return Model(family, config, fresh.drawn(config, seed), tokenizer, ids)


def add_classifier(model: Model, labels: Sequence[str], *, of: str = 'sequence',
                   seed: int = 0) -> Model:
  """An encoder with a fresh head for labels, of texts or (of='token') of words.

  Raises:
    InputError: no encoder, or labels that are not names, each once.
  """
  config, params = fresh.with_head(model.family, model.config, model.params, labels, of, seed)
  return dataclasses.replace(model, config=config, params=params)


def allocate_bits(model: Model, tokens, budget: float | str = '3.2 bits', *,
                  schemes: Sequence[str] = mixed.SCHEMES,
                  where: str = MATRICES) -> tuple[tuple[str, str], ...]:
  """Rules for `quantize`: of each weight the scheme with which the loss is least in so many bytes.

  Stacked layers are one weight, of one scheme. For bits that differ by layer, load the model with
  scan_layers=False, or give `scan_layers(model, False)`; every layer is then compiled.

  Args:
    tokens: [B T], text on which losses are measured: see `quantization.mixed`.
    budget: '3.2 bits' a parameter, scales included, of the weights that match; or their bytes.
    schemes: to choose from.
    where: a regular expression on the weights' whole names.

  Raises:
    InputError: tokens of another shape, schemes that are none or too large for the budget, weights
      that are rounded already.
  """
  check_reads_text(model)
  tokens = jnp.asarray(tokens, jnp.int32)
  if tokens.ndim != 2 or tokens.shape[1] < 2:
    raise InputError(f'tokens of shape {tokens.shape}; give [B T], texts of at least 2 tokens')
  names = mixed.matched(model.params, where)
  limit = mixed.budget_bytes(budget, model.params, names)
  costs, sizes = mixed.sensitivities(model.module, model.params, tokens, schemes, where)
  chosen = mixed.allocate_bits(costs, sizes, limit)
  return tuple((re.escape(name), scheme) for name, scheme in chosen.items())


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

  `peft.PeftModel.from_pretrained(base, folder)` loads them: LoRA, DoRA, VeRA and IA3, of modules
  that are one weight each; a prefix, without the MLP that made it; a prompt. The base's fingerprint
  is recorded.

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


def rotate(model: Model, key) -> Model:
  """The model in a randomly rotated basis: every logit as it was, and no channel that stands out.

  Rounding it to few bits then costs less: see `quantization.rotation` (QuaRot).

  Args:
    key: a jax PRNG key.

  Raises:
    InputError: norms or branches that no rotation passes through, or weights that are not floats.
  """
  refuse_beside(model.params, 'rotated')
  config, params = rotation.rotate(model.config, model.params, key)
  return dataclasses.replace(model, config=config, params=params)


def train(model: Model, data, *, steps: int, batch: int = 16, peak: float = 1e-3,
          window: int | None = None, seed: int = 0, workdir=None, field: str = 'text',
          cache=None, **settings) -> Model:
  """Trains on text: the adapters if the model has any, else all of it.

  Args:
    data: a path (see `data.sources.open_source`), a Source, or Windows; or `completions`.
    window: tokens a window; None is the model's context, at most 512.
    workdir: where checkpoints and metrics go; the same call goes on from what is there.
    cache: a folder of `cache_teacher`, or its Cache: the losses then look at the labels in it.
    settings: of `training.recipe.train`: warmup, weight_decay, trainable, hooks, mesh, ...
  """
  if cache is not None and not isinstance(cache, Cache):
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
  (`text`): see `data.examples`. Several share a row and do not see each other.

  Args:
    data: the path of a .jsonl file or of a folder of them, a list of records, or ExampleWindows.
    method: of `training.finetune.TUNINGS`: 'qlora' rounds a float model to nf4-g64-dq first;
      'lora', 'dora', 'vera', 'pissa', 'ia3', 'bitfit', 'full'.
    adapter: settings of `attach`: rank, alpha, where, rules, dropout, ...
    epochs: how often every example is seen; steps instead says how many steps there are.
    batch: rows a step, as many as there are at most.
    peak: the greatest learning rate; None is the method's usual one.
    window: tokens a row; None is the model's context, at most 2048.
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
  """The model that `begin` gave, trained on ExampleWindows; args as of `finetune`."""
  how, batch = tuning.TUNINGS[method], min(batch, len(windows))
  batches = Batches(windows, batch, seed)
  params, _ = recipe.train(
      model.module, model.params, batches, steps=steps or tuning.steps_of(windows, batch, epochs),
      peak=how.peak if peak is None else peak, seed=seed, folder=workdir, trainable=how.trainable,
      **settings)
  return dataclasses.replace(model, params=params)


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
            on_policy: Mapping[str, Any] | None = None, **settings) -> Model:
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
    student = _begun(teachers[0], keep, init, data, settings)
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


def _begun(teacher, keep, init='alternating', data=None, settings=None):
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


def label(model: Model, texts: Sequence[str] | Sequence[Sequence[str]],
          labels: Sequence[str] | Mapping[str, str], *, prompt: str, out=None,
          batch: int = 16) -> list[dict[str, Any]]:
  """Texts labelled by a generator, for `train_classifier`: see `distillation.labelling.label`."""
  return labelling.label(model, texts, labels, prompt=prompt, out=out, batch=batch)


def train_classifier(model: Model, data, *, steps: int, teacher: Model | None = None,
                     batch: int = 16, peak: float = 1e-4, temperature: float = 1.,
                     soft_weight: float | None = None, truncate: bool = False, seed: int = 0,
                     workdir=None, **settings) -> Model:
  """Trains a classifier of texts or of words on labels, on a teacher's scores of them, or on both.

  All of it trains; of one with adapters these and its head, which `save` writes and `save_adapter`
  does not.

  Args:
    model: an encoder with a head: see `add_classifier`.
    data: rows of `data.labelled`, or their JSONL file, of `label` say.
    teacher: a classifier of the same labels, of any tokenizer; its logits are then the scores.
    temperature: of the scores' and the model's distributions.
    soft_weight: of scores, the labels have the rest; None is 1 without labels, 0 without scores,
      else .7.
    truncate: whether the end of a text that is too long is left out.
    settings: of `training.recipe.train`.

  Raises:
    InputError: a model or teacher that does not classify, other labels, rows without any, or a
      setting out of range.
  """
  head, rows, encoded = _encoded(model, data, truncate)
  if teacher is not None:
    if set(teacher.labels) != set(model.labels):
      raise InputError(f'the teacher has labels {", ".join(teacher.labels)}, the model '
                       f'{", ".join(model.labels)}; give both the same')
    rows = labelled.scored_by(teacher, rows, head, truncate)
  wanted, scores = labelled.targets(rows, model.labels, head == 'token')
  soft_weight = labelled.share(wanted, scores, temperature, soft_weight)
  batches = labelled.batches(encoded, wanted, scores, batch=batch, seed=seed,
                             context=model.config.context)
  loss = classes(model.module, float(temperature), float(soft_weight))
  told = dict(kind='classes', temperature=temperature, soft_weight=soft_weight)
  settings.setdefault('trainable', trained_with(model.params, fresh.HEAD))
  params, _ = recipe.train(model.module, model.params, batches, steps=steps, peak=peak, seed=seed,
                           folder=workdir, objective=(loss, told), **settings)
  return dataclasses.replace(model, params=params)


def evaluate_classifier(model: Model, data, *, batch: int = 32,
                        truncate: bool = False) -> dict[str, float]:
  """accuracy, nll (nats a label) and count, over the labels of rows of `data.labelled`."""
  head, rows, _ = _encoded(model, data, truncate)
  wanted, _ = labelled.targets(rows, model.labels, head == 'token')
  texts = labelled.texts_of(rows, head)
  if head == 'token':
    logits = np.concatenate(model.tag(texts, batch=batch, truncate=truncate))
    return labelled.figures(logits, np.concatenate(wanted))
  logits = model.classify(texts, batch=batch, truncate=truncate)
  return labelled.figures(logits, np.stack(wanted))


def distill_encoder(teacher: Model, texts: Sequence[str], *, steps: int,
                    student: Model | None = None, keep: int | None = None,
                    losses: Sequence[Mapping[str, Any]] = (dict(kind='mse'),), batch: int = 32,
                    peak: float = 1e-4, seed: int = 0, workdir=None, **settings) -> Model:
  """A smaller model of texts' vectors, like the teacher's (Reimers & Gurevych 2020).

  Args:
    teacher: its vectors are made once, before training.
    student: of any tokenizer and width; None takes evenly spread layers of the teacher. Where
      widths differ, a matrix between is learned, which is not part of the student.
    keep: how many layers; None is half of them.
    losses: of `distillation.vectors`: mse, cosine, similarity_kl.
    settings: of `training.recipe.train`.
  """
  student = _begun(teacher, keep) if student is None else student
  terms, told = vectors.parsed(losses), json.dumps([dict(x) for x in losses], sort_keys=True)
  way = pooling_of(student.config)
  targets = teacher.embed(texts, truncate=True)
  rows = texts_in.read_texts(student.module, student.tokenizer, texts, truncate=True)
  widths = (student.config.width * len(way.modes), targets.shape[1])
  learned = vectors.projection(terms, widths, seed)
  params = {**student.params, PROJECTIONS: learned} if learned else student.params
  batches = vectors.vector_batches(rows, targets, batch=batch, seed=seed,
                                   context=student.config.context)
  params, _ = recipe.train(
      student.module, params, batches, steps=steps, peak=peak, seed=seed, folder=workdir,
      objective=(vectors.like_teacher(student.module, way, told), json.loads(told)), **settings)
  return dataclasses.replace(student, params=params)


def distill_ranker(teacher: Model | Sequence[float], student: Model,
                   triples: Sequence[tuple[str, str, str]], *, steps: int, scale: float = 1.,
                   batch: int = 32, peak: float = 1e-4, seed: int = 0, workdir=None,
                   **settings) -> Model:
  """A model of vectors that ranks texts as a cross-encoder does: margin-MSE of its products.

  Args:
    teacher: a classifier of pairs with one label, its score; or the margins themselves [n].
    student: embeds.
    triples: (query, a relevant text, another).
    scale: what the teacher's margins are multiplied by; products of vectors that the student brings
      to length one differ by 2 at most.
    settings: of `training.recipe.train`.

  Raises:
    InputError: no triples, a teacher of several labels, or margins that are not as many.
  """
  sides = list(zip(*triples))
  if len(sides) != 3:
    raise InputError(f'triples {triples!r:.60}; expected (query, relevant text, another) each')
  if isinstance(teacher, Model):
    if len(teacher.labels) != 1:
      raise InputError(f'the teacher has labels {", ".join(teacher.labels) or "none"}; give a '
                       'classifier of pairs with one, the score')
    scores = [teacher.classify(list(zip(sides[0], side)), truncate=True)[:, 0]
              for side in sides[1:]]
    teacher = scores[0] - scores[1]
  margins = scale * np.asarray(teacher, np.float32)
  if margins.shape != (len(triples),):
    raise InputError(f'margins of shape {margins.shape} for {len(triples)} triples; give one each')
  rows = [texts_in.read_texts(student.module, student.tokenizer, side, truncate=True)
          for side in sides]
  batches = vectors.triple_batches(rows, margins, batch=batch, seed=seed,
                                   context=student.config.context)
  loss = vectors.like_ranker(student.module, pooling_of(student.config))
  params, _ = recipe.train(
      student.module, student.params, batches, steps=steps, peak=peak, seed=seed, folder=workdir,
      objective=(loss, dict(kind='margin_mse')), **settings)
  return dataclasses.replace(student, params=params)


def federated_server(folder, clients: Sequence[str], public, like: Model, *, rounds: int,
                     windows: int = 64, window: int = 64, field: str = 'text', **settings):
  """Averages what clients predict on public text, until all rounds are over.

  Args:
    folder: that server and clients write to; the same call goes on with what is there.
    clients: their names.
    public: text, as `train` takes it.
    like: a model of the clients' tokenizer; of its weights nothing is used.
    rounds: how many; windows: of public text in each; window: their tokens.
    settings: top, weights, seed and timeout of `distillation.federated.server`.
  """
  with packed_windows(public, 'all', like, window, field) as packed:
    told = packed.fingerprint, len(packed), packed.length
  federated.server(folder, clients, public=told, vocabulary=like.config.vocabulary, rounds=rounds,
                   windows=windows, **settings)


def federated_client(model: Model, folder, name: str, data, public, *, workdir, revisit: int,
                     digest: int, batch: int = 16, peak: float = 1e-3, window: int = 64,
                     seed: int = 0, timeout: float = 3600., field: str = 'text',
                     **settings) -> Model:
  """One client of federated distillation, in a process of its own: see `distillation.federated`.

  Args:
    model: where it starts; of any architecture.
    folder, public, window: as of the server; nothing else is shared, no weights and no text.
    name: of this client, one of the server's.
    data: this client's own text.
    workdir: this client's own folder; the same call goes on with what is there.
    revisit, digest: steps of a round on its own text, and on what all predict.
    settings: of `training.recipe.train`.
  """
  with packed_windows(data, 'all', model, window, field) as own, packed_windows(
      public, 'all', model, window, field) as packed:
    def train_on(model, batches, objective, steps, turn, at):
      batches = Batches(own, min(batch, len(own)), seed + turn) if batches is None else batches
      params, _ = recipe.train(model.module, model.params, batches, steps=steps, peak=peak,
                               seed=seed, folder=at, objective=objective, **settings)
      return dataclasses.replace(model, params=params)
    return federated.client(
        model, folder, name, train=train_on, save=save, load=load, public=packed, workdir=workdir,
        revisit=revisit, digest=digest, timeout=timeout)


def evaluate_retrieval(model: Model, queries: Mapping[str, str], documents: Mapping[str, str],
                       judged: Mapping[str, Mapping[str, float]], **settings) -> dict[str, float]:
  """recall@10, recall@100, ndcg@10 and mrr@10 of a model's vectors: see `evaluation.retrieval`."""
  return retrieval.evaluate(model, queries, documents, judged, **settings)


def evaluate(model: Model, data, *, window: int | None = None, field: str = 'text',
             split: str = 'all', cache: str = 'float', progress=None) -> dict[str, float]:
  """Perplexity by the protocol of docs/evaluation.md.

  Args:
    data: a path (see `data.sources.open_source`), a Source, or Windows.
    window: tokens a window; None is the model's context.
    split: 'all', or 'test' of a source that is split.
    cache: 'int8' or 'int4' reads keys and values as `generate` does with it: see its `caches`.

  Returns:
    perplexity, nll, bits_per_byte, tokens, seconds.
  """
  with packed_windows(data, split, model, window or model.config.context, field) as windows:
    return perplexity(with_cache(model.module, cache), model.params, windows, progress=progress)


@contextlib.contextmanager
def _batches(model, data, batch, seed, window, field, cache):
  """What `train` learns from, for as long as the block lasts."""
  if isinstance(data, Completions):
    if window is not None or cache is not None:
      raise InputError('completions with a window or a cache; they have a length of their own, and '
                       'caches are of text alone: leave both out')
    yield Batches(data, batch, seed)
    return
  window = window or (min(model.config.context, 512) if cache is None else cache.length)
  with packed_windows(data, 'train', model, window, field) as windows:
    batches = Batches(windows, batch, seed)
    if cache is not None:
      check_labels(cache, model.config, model.tokenizer, windows)
    yield batches if cache is None else LabelledBatches(batches, cache)


def _encoded(model, data, truncate):
  """A classifier's head, rows of `data.labelled`, and the ids that it reads of each."""
  head, rows = getattr(model.config, 'head', None), labelled.rows_of(data)
  if head not in fresh.HEADS:
    raise InputError(f'this {model.family.model_type} has no head of classes; give an encoder that '
                     'has, of lean.add_classifier(encoder, labels) say')
  texts = labelled.texts_of(rows, head)
  if head == 'token':
    return head, rows, texts_in.read_words(model.module, model.tokenizer, texts, truncate)
  return head, rows, texts_in.read(
      model.module, model.tokenizer, texts_in.strings(texts, pairs=True), model.config.context,
      truncate)


def _check_described(folder, config, params):
  odd = hf.misfits(config, params)
  if odd:
    raise InputError(f'{folder}: lean.json and config.json are of different models, they differ in '
                     f'{tensors.listed(odd)}; copy or make the folder again')


def _most_inputs(model, steps):
  """Of the widest weight that one of the steps is for."""
  found = tree.matched(model.params, [(step['where'], methods) for step in steps])
  weights = tree.named_weights(model.params)
  return max(math.prod(sides(weights[name])[1]) for name in found)


def _apply(model, *steps, seed=0):
  params = methods.apply(model.params, steps, jax.random.key(seed))
  return dataclasses.replace(model, params=params)


_logits = jax.jit(lambda module, params, batch: forward(module, params, batch)[0], static_argnums=0)
