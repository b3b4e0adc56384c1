"""What models make of texts: vectors, and logits of classes."""
import functools

import jax
import numpy as np
from tokenizers.normalizers import Lowercase

from lean_jax.data.padded import padded
from lean_jax.errors import InputError
from lean_jax.nn.pooling import Pooling, pooled, unit
from lean_jax.training import mesh as meshes

_lower = Lowercase()


def embed(module, params, tokenizer, texts, *, batch=32, truncate=None):
  """The vector of each text, [n D] float32.

  It is made as the config's pooling says; without one it is the mean of the last hidden states (an
  encoder's, where there is a decoder too), over the tokens that the tokenizer gives, those that it
  puts around a text included.

  Args:
    module: an encoder, a decoder, or both.
    params: its parameters, of any kinds of weights.
    tokenizer: a `Tokenizer`.
    texts: strings.
    batch: texts a step; changes memory and speed, not the result.
    truncate: whether the end of a text that is too long is left out; None is True for a sentence
      encoder, a model with a pooling, and else False.

  Raises:
    InputError: texts that are no strings, have no token, or are too long.
  """
  config = module.config
  way = reads(config).pooling or Pooling()
  rows = read_texts(module, tokenizer, texts, truncate)
  function = functools.partial(_vectors, module, way.modes, way.normalize)
  return run(function, params, rows, batch, config, config.width * len(way.modes))


def read_texts(module, tokenizer, texts, truncate=None):
  """[(ids, types)] of texts as `embed` reads them."""
  config = module.config
  way = reads(config).pooling
  truncate, most = way is not None if truncate is None else truncate, limit(config, tokenizer)
  way = way or Pooling()
  texts = [way.prompt + text for text in strings(texts)]
  texts = [_lower.normalize_str(text) for text in texts] if way.lower else texts
  return read(module, tokenizer, texts, most, truncate)


def classify(module, params, tokenizer, texts, *, batch=32, truncate=False):
  """Logits of the labels of each text, [n labels] float32.

  Args:
    module: an encoder with a head of sequences.
    params, tokenizer, batch: as of `embed`.
    texts: strings, or pairs of strings.
    truncate: whether the end of a text that is longer than the context, of the longer one of a
      pair, is left out.

  Raises:
    InputError: a model that has no such head, or texts as of `embed`.
  """
  config = module.config
  if getattr(config, 'head', None) != 'sequence':
    raise InputError('the model gives texts no classes; give one whose config.json has '
                     '...ForSequenceClassification in its architectures')
  rows = read(module, tokenizer, strings(texts, pairs=True), config.context, truncate)
  function = functools.partial(_logits, module)
  return run(function, params, rows, batch, config, len(config.labels))


def tag(module, params, tokenizer, sentences, *, batch=32, truncate=False):
  """Logits of the labels of each word, at its first token: a [words labels] float32 a sentence.

  Args:
    module: an encoder with a head of tokens.
    params, tokenizer, batch: as of `embed`.
    sentences: lists of words.
    truncate: whether the end of a sentence that is longer than the context is left out; its words
      have NaN.

  Raises:
    InputError: a model that has no such head, or sentences that are none or too long.
  """
  config = module.config
  if getattr(config, 'head', None) != 'token':
    raise InputError('the model gives words no classes; give one whose config.json has '
                     '...ForTokenClassification in its architectures')
  rows = read_words(module, tokenizer, sentences, truncate)
  out = [np.full((len(places), len(config.labels)), np.nan, np.float32) for *_, places in rows]
  for of, given in padded([row[:2] for row in rows], batch, config.context):
    with meshes.of(params):
      logits = np.asarray(_logits(module, params, given))                       # [B T labels]
    for k, own in zip(of, logits):
      places = rows[k][2]
      out[k][places >= 0] = own[places[places >= 0]]
  return out


def read_words(module, tokenizer, sentences, truncate):
  """[(ids, types, places)] of lists of words: see `Tokenizer.words`."""
  sentences, most = list(sentences), module.config.context
  for words in sentences:
    if not isinstance(words, list | tuple) or not words or not all(
        isinstance(w, str) for w in words):
      raise InputError(f'a sentence is {words!r:.60}; give lists of words')
  rows = tokenizer.words(sentences, most=most if truncate else None)
  check_ids([row[0] for row in rows], most, module.config.vocabulary)
  return rows


def limit(config, tokenizer):
  """Tokens of a text at most: the context, or what a sentence encoder has as less."""
  context, way = reads(config).context, reads(config).pooling
  if way is None:
    return context
  return min(context, way.length or tokenizer.settings.get('model_max_length') or context)


def reads(config):
  """The config of the stack that reads texts."""
  return getattr(config, 'encoder', config)


def strings(texts, pairs=False):
  """A list of strings, or of pairs of them as tuples; raises InputError for anything else."""
  wanted = 'strings or pairs of them' if pairs else 'strings'
  if isinstance(texts, str):
    raise InputError(f'texts are one string; give a list of {wanted}')
  out = []
  for text in texts:
    pair = pairs and isinstance(text, (tuple, list)) and len(text) == 2
    if not all(isinstance(t, str) for t in (text if pair else [text])):
      raise InputError(f'a text is {text!r:.60}; give {wanted}')
    out.append(tuple(text) if pair else text)
  return out


def read(module, tokenizer, texts, most, truncate):
  """[(ids, types)] of texts; raises InputError for an empty one, or one that is too long."""
  rows = tokenizer.rows(texts, most=most if truncate else None)
  for text, (ids, _) in zip(texts, rows):
    if not len(ids):
      raise InputError(f'the text {text!r:.60} has no token; give one that has')
  check_ids([ids for ids, _ in rows], most, module.config.vocabulary)
  types = getattr(module.config, 'token_types', 0) > 1 and 'token_type_ids' in (
      tokenizer.settings.get('model_input_names') or ['token_type_ids'])
  return [(ids, kinds if types else np.zeros_like(kinds)) for ids, kinds in rows]


def check_ids(rows, most, vocabulary):
  """Raises InputError for ids [T] of a text that is too long, or that a model does not have."""
  for ids in rows:
    if len(ids) > most:
      raise InputError(f'a text of {len(ids)} tokens, the model reads {most} at most; shorten it, '
                       'or ask for truncate=True')
  largest = max((int(ids.max()) for ids in rows), default=0)
  if largest >= vocabulary:
    raise InputError(f'the texts have token {largest}, the model has 0 to {vocabulary - 1}; give '
                     'the tokenizer of this model')


def run(function, params, rows, batch, config, width):
  """What a function (params, batch) gives of each row, [n width] float32."""
  if batch < 1:
    raise InputError(f'batch {batch}; give 1 or more')
  out = np.empty((len(rows), width), np.float32)
  for of, given in padded(rows, batch, reads(config).context):
    with meshes.of(params):
      out[of] = np.asarray(function(params, given))[:len(of)]
  return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _vectors(module, modes, normalize, params, given):
  return vectors(module, modes, normalize, params, given)


def vectors(module, modes, normalize, params, given):
  """The vector of each row of a batch, [B D] float32: see `embed`."""
  if 'decoder_tokens' in module.inputs:
    x = module.apply({'params': params}, given['tokens'], given['mask'], method='encode')
    x = x[:, x.shape[1] - given['tokens'].shape[1]:]   # without a soft prompt before it
  else:
    x, _ = module.apply({'params': params}, **given, method='hidden')
  y = pooled(x, given['mask'], modes)
  return unit(y) if normalize else y


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, given):
  """[B labels] or [B T labels] float32."""
  return module.apply({'params': params}, **given)[0]
