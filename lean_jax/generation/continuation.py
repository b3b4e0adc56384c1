"""What a model writes after a prompt, or of a source."""
import jax.numpy as jnp
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation.loop import bucket, decode, prefill


def generate(module, params, prompt_ids, *, tokens, temperature=0., top_k=None, top_p=None,
             eos=None, key=None):
  """The ids that follow a prompt; of an encoder and a decoder, the target of a source.

  Args:
    module: a decoder: `hidden`, `logits` and a config with a context and a vocabulary; or an
      encoder and a decoder, which has `encode` too.
    params: its parameters, of any kinds of weights.
    prompt_ids: [T], or [B T] for prompts of one length; BOS included where the model wants it. Of
      an encoder and a decoder the source, with the tokens that end it.
    tokens: how many at most, 1 or more.
    temperature: 0 takes the most probable token; above, samples.
    top_k, top_p: keep the most probable tokens, see `sampling.sample`; of no effect at
      temperature 0.
    eos: the id, or ids, that end the text; None writes all tokens.
    key: a jax PRNG key; needed above temperature 0.

  Returns:
    [n] or [B n], int32, n <= tokens, without the prompt, or without the target's start token. A
    text ends with its end token; in a batch the rows that end early are filled up with it.

  Raises:
    InputError: an argument that is out of its range, or more tokens than the context has.
  """
  config = module.config
  prompt = checked_prompt(prompt_ids, config.vocabulary)
  source, target, skip = begun(module, prompt)
  B, T = target.shape
  end = skip + tokens
  check(skip, tokens, config.context, temperature, top_k, top_p, key)
  ends = np.asarray([] if eos is None else eos, np.int32).reshape(-1)
  ids = np.zeros((B, bucket(end, config.context)), np.int32)
  ids[:, :T], at = target, T
  greedy = temperature == 0
  how = (None, None, None) if greedy else (key, temperature, top_p)
  top_k = None if greedy else top_k
  read = {} if source is None else dict(source=source, source_length=prompt.shape[1])
  for stop in stops(config, T, end):
    padded = bucket(at, config.context) if source is None else at
    new, cache = prefill(module, params, jnp.asarray(ids), at, *how, top_k=top_k, padded=padded,
                         **read)
    new = ended_stay(new, at, ends) if at > T else new
    new, at, _ = decode(module, params, new, cache, at + 1, stop, *how, ends, top_k=top_k)
    ids, at = np.array(new), int(at)
    if at < stop or np.isin(ids[:, at - 1], ends).all():
      break
  out = ids[:, skip:at]
  if source is not None and config.last is not None and out.shape[1] == tokens:
    ended = np.isin(out[:, :-1], ends).any(axis=1)
    out[:, -1] = np.where(ended, out[:, -1], config.last)
  return out if np.ndim(prompt_ids) == 2 else out[0]


def stops(config, start, end):
  """Where the cache is made anew for the tokens after, and the end; () if there is nothing to do.

  It is once a sequence is longer than one of `StackConfig.renewals`.
  """
  return [*(n + 1 for n in config.decoding.renewals if start <= n < end - 1),
          *([end] if end > start else ())]


def ended_stay(ids, at, ends):
  """Ids where rows that ended before `at` have their end token there too."""
  last = ids[:, at - 1]
  return ids.at[:, at].set(jnp.where(jnp.isin(last, ends), last, ids[:, at]))


def begun(module, prompt):
  """What the model reads before it writes.

  Returns:
    source [B R], filled up to a length for which there is one program, or None; the beginning of
    what it writes, [B T]; how many of these tokens are no part of the result.

  Raises:
    InputError: a source longer than the encoder reads.
  """
  if 'decoder_tokens' not in module.inputs:
    return None, prompt, prompt.shape[1]
  c, (B, length) = module.config, prompt.shape
  if length > c.encoder.context:
    raise InputError(f'a source of {length} tokens, the model reads {c.encoder.context} at most; '
                     'shorten it')
  source = np.zeros((B, bucket(length, c.encoder.context)), np.int32)
  source[:, :length] = prompt
  start = [c.start] if c.first is None else [c.start, c.first]
  return jnp.asarray(source), np.tile(np.array(start, np.int32), (B, 1)), 1


def checked_prompt(prompt_ids, vocabulary):
  """The prompt as [B T]; raises InputError if it is not made of the vocabulary's ids."""
  prompt = np.asarray(prompt_ids)
  if not prompt.size or prompt.ndim not in (1, 2):
    raise InputError(f'a prompt of shape {prompt.shape}; give one token or more, [T] or [B T]')
  if not np.issubdtype(prompt.dtype, np.integer):
    raise InputError(f'a prompt of {prompt.dtype}; give integer ids')
  if prompt.min() < 0 or prompt.max() >= vocabulary:
    raise InputError(f'the prompt has ids from {prompt.min()} to {prompt.max()}, the model has '
                     f'0 to {vocabulary - 1}; give the tokenizer of this model')
  return prompt.reshape(-1, prompt.shape[-1])


def check(length, tokens, context, temperature, top_k, top_p, key):
  """Raises InputError for the first argument out of its range."""
  if tokens < 1:
    raise InputError(f'{tokens} tokens to generate; give 1 or more')
  if length + tokens > context:
    raise InputError(f'a prompt of {length} tokens and {tokens} to generate are {length + tokens}, '
                     f'the context has {context}; shorten the prompt or generate fewer')
  if not 0 <= temperature < float('inf'):
    raise InputError(f'temperature {temperature}; give 0 for the most probable token, or more')
  if top_k is not None and top_k < 1:
    raise InputError(f'top_k {top_k}; give 1 or more, or leave it out')
  if top_p is not None and not 0 < top_p <= 1:
    raise InputError(f'top_p {top_p}; give more than 0 and at most 1, or leave it out')
  if temperature > 0 and key is None:
    raise InputError(f'temperature {temperature} samples, which needs randomness; give a key, '
                     'jax.random.key(seed)')
