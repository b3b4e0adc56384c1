"""What a model writes after a prompt."""
import jax.numpy as jnp
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation.loop import bucket, decode, prefill


def generate(module, params, prompt_ids, *, tokens, temperature=0., top_k=None, top_p=None,
             eos=None, key=None):
  """The ids that follow a prompt.

  Args:
    module: a decoder: `hidden`, `logits` and a config with a context and a vocabulary.
    params: its parameters, of any kinds of weights.
    prompt_ids: [T], or [B T] for prompts of one length; BOS included where the model wants it.
    tokens: how many at most, 1 or more.
    temperature: 0 takes the most probable token; above, samples.
    top_k, top_p: keep the most probable tokens, see `sampling.sample`; of no effect at
      temperature 0.
    eos: the id, or ids, that end the text; None writes all tokens.
    key: a jax PRNG key; needed above temperature 0.

  Returns:
    [n] or [B n], int32, n <= tokens, without the prompt. A text ends with its end token; in a
    batch the rows that end early are filled up with it.

  Raises:
    InputError: an argument that is out of its range, or more tokens than the context has.
  """
  config = module.config
  prompt = checked_prompt(prompt_ids, config.vocabulary)
  B, T = prompt.shape
  check(T, tokens, config.context, temperature, top_k, top_p, key)
  ends = np.asarray([] if eos is None else eos, np.int32).reshape(-1)
  ids = np.zeros((B, bucket(T + tokens, config.context)), np.int32)
  ids[:, :T] = prompt
  greedy = temperature == 0
  how = (None, None, None) if greedy else (key, temperature, top_p)
  top_k = None if greedy else top_k
  ids, cache = prefill(module, params, jnp.asarray(ids), T, *how, top_k=top_k,
                       padded=bucket(T, config.context))
  ids, at, _ = decode(module, params, ids, cache, T + 1, T + tokens, *how, ends, top_k=top_k)
  out = np.asarray(ids)[:, T:int(at)]
  return out if np.ndim(prompt_ids) == 2 else out[0]


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
