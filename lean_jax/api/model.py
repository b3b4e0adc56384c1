"""What a model is, and what it is loaded from and saved to."""
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.data.packed import packed_windows
from lean_jax.data.tokenizer import Tokenizer, load_tokenizer
from lean_jax.errors import InputError
from lean_jax.evaluation import texts as texts_in
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.files import occupied, replace_folder
from lean_jax.generation.caches import with_cache
from lean_jax.generation.text import generate
from lean_jax.interop import formats, gguf, gguf_write, hf, sentence, tensors
from lean_jax.interop.hub import local_folder
from lean_jax.models import fresh
from lean_jax.models.config import StackConfig
from lean_jax.models.families import Family, family_of
from lean_jax.models.segments import configured, converted
from lean_jax.objectives.forward import forward
from lean_jax.training import mesh as meshes
from lean_jax.training.checkpoint import load_model, save_model
from lean_jax.training.stored import spread
from lean_jax.weights.beside import refuse_beside
from lean_jax.weights.prepared import refuse_prepared

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


_logits = jax.jit(lambda module, params, batch: forward(module, params, batch)[0], static_argnums=0)
