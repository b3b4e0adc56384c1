"""Models as people use them: thin calls of the pure functions below."""
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import methods, tree
from lean_jax.adapters import ia3, several
from lean_jax.adapters.lora import sides
from lean_jax.adapters.peft import load_peft, save_peft
from lean_jax.adapters.requantize import requantize as merged_again
from lean_jax.calibration.quantize import MATRICES, quantize  # noqa: F401, of this interface
from lean_jax.data.batches import Batches
from lean_jax.data.packed import check_reads_text, packed_windows
from lean_jax.data.tokenizer import Tokenizer, load_tokenizer
from lean_jax.distillation.losses import soft_and_hard
from lean_jax.distillation.start import alternating, take_layers
from lean_jax.errors import InputError
from lean_jax.evaluation import texts as texts_in
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.files import occupied, replace_folder
from lean_jax.generation.caches import with_cache
from lean_jax.generation.text import generate
from lean_jax.interop import formats, gguf, gguf_write, hf, sentence, tensors
from lean_jax.interop.hub import local_folder
from lean_jax.models.families import Family, family_of
from lean_jax.models.segments import configured, converted
from lean_jax.models.stack import StackConfig
from lean_jax.objectives.forward import forward
from lean_jax.quantization import mixed, rotation
from lean_jax.training import mesh as meshes
from lean_jax.training import recipe
from lean_jax.training.checkpoint import load_model, save_model
from lean_jax.training.stored import spread
from lean_jax.weights.prepared import refuse_prepared

ADAPTERS = ('lora', 'dora', 'vera', 'pissa', 'ia3')
FORMATS = ('lean', 'hf', 'gguf', *formats.FORMATS)


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
    method: 'lora', 'dora', 'vera', 'pissa' or 'ia3', of the file of that name in `adapters`.
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
  last = ia3.PLACES if method == 'ia3' and where is None and 'side' not in settings else (
      (where or MATRICES, {}),)
  steps = [dict(settings, **own, where=name, method=method) for name, own in (*rules, *last)]
  if method == 'vera':
    steps = [dict(inputs=_most_inputs(model, steps)) | dict(seed=seed) | step for step in steps]
  return _apply(model, *steps, seed=seed)


def save_adapter(model: Model, folder, *, overwrite: bool = False):
  """Writes a model's adapters alone, as the PEFT library has them, to a new folder.

  `peft.PeftModel.from_pretrained(base, folder)` loads them: LoRA, DoRA, VeRA and IA3, of modules
  that are one weight each. The base's fingerprint is recorded.

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

  Memory is the base once, and the adapters, each of the largest rank. `use` switches.

  Raises:
    InputError: none are given, adapters other than LoRA, or over another base.
  """
  params = several.together({name: model.params for name, model in adapted.items()})
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
  """The model with its adapters merged into dense weights."""
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
  config, params = rotation.rotate(model.config, model.params, key)
  return dataclasses.replace(model, config=config, params=params)


def train(model: Model, data, *, steps: int, batch: int = 16, peak: float = 1e-3,
          window: int | None = None, seed: int = 0, workdir=None, field: str = 'text',
          **settings) -> Model:
  """Trains on text: the adapters if the model has any, else all of it.

  Args:
    data: a path (see `data.sources.open_source`), a Source, or Windows.
    window: tokens a window; None is the model's context, at most 512.
    workdir: where checkpoints and metrics go; the same call goes on from what is there.
    settings: of `training.recipe.train`: warmup, weight_decay, trainable, hooks, mesh, ...
  """
  window = window or min(model.config.context, 512)
  with packed_windows(data, 'train', model, window, field) as windows:
    params, _ = recipe.train(model.module, model.params, Batches(windows, batch, seed), steps=steps,
                             peak=peak, seed=seed, folder=workdir, **settings)
  return dataclasses.replace(model, params=params)


def distill(teacher: Model | Sequence[Model], data, *, student: Model | None = None,
            keep: int | None = None, temperature: float | None = None,
            soft_weight: float | None = None, losses: Sequence[Mapping[str, Any]] | None = None,
            **settings) -> Model:
  """A smaller model trained on what the teacher shows, and on the text.

  Args:
    teacher: one, or several, by number in the losses.
    student: where it starts; None takes evenly spread layers of the (first) teacher.
    keep: how many layers; None is half of them.
    temperature, soft_weight: of soft labels (2 and .7); the text's own have the rest.
    losses: instead of these, a list such as [dict(kind='reverse_kl', temperature=2.),
      dict(kind='hidden', weight=.5)]: see `distillation.losses.parsed`.
    settings: of `train`.

  Raises:
    InputError: another tokenizer, a loss that cannot be, or temperature and soft_weight with
      losses.
  """
  teachers = [teacher] if isinstance(teacher, Model) else list(teacher)
  for one in teachers:
    check_reads_text(one)
  teacher = teachers[0]
  if student is None:
    indices = alternating(teacher.config.layers, keep or teacher.config.layers // 2)
    config, params = take_layers(teacher.config, teacher.params, indices)
    student = dataclasses.replace(teacher, config=config, params=params)
  for one in teachers:
    if student.tokenizer.fingerprint != one.tokenizer.fingerprint:
      raise InputError(f'the student reads by another tokenizer ({student.tokenizer.size} tokens) '
                       f'than the teacher ({one.tokenizer.size}); distillation needs the same')
  of_labels = {k: v for k, v in dict(temperature=temperature, soft_weight=soft_weight).items()
               if v is not None}
  if losses is None:
    losses = soft_and_hard(**dict(soft_weight=.7) | of_labels)
  elif of_labels:
    raise InputError(f'losses and {" and ".join(of_labels)} too; say them in the losses')
  return train(student, data, teacher=[(one.module, one.params) for one in teachers],
               losses=losses, **settings)


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
