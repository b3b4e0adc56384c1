"""What is given to a model to go on from, and what cannot be."""
import jax.numpy as jnp
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation.loop import bucket


def checked_prompts(prompt_ids, vocabulary):
  """A list of prompts, int32 [T] each, of one, of an array of them, or of a list of any lengths.

  Raises:
    InputError: there is none, one is empty, or an id is none of the vocabulary's.
  """
  prompts = [np.asarray(p) for p in (prompt_ids if several(prompt_ids) else [prompt_ids])]
  for prompt in prompts:
    if not prompt.size or prompt.ndim != 1:
      raise InputError(f'a prompt of shape {prompt.shape}; give one token or more, [T] or [B T]')
    if not np.issubdtype(prompt.dtype, np.integer):
      raise InputError(f'a prompt of {prompt.dtype}; give integer ids')
    if prompt.min() < 0 or prompt.max() >= vocabulary:
      raise InputError(f'the prompt has ids from {prompt.min()} to {prompt.max()}, the model has '
                       f'0 to {vocabulary - 1}; give the tokenizer of this model')
  return [prompt.astype(np.int32) for prompt in prompts]


def several(prompt_ids):
  """Whether these are several prompts: an array of two axes, or a list of sequences."""
  if isinstance(prompt_ids, list | tuple):
    return len(prompt_ids) > 0 and np.ndim(prompt_ids[0]) > 0
  return np.ndim(prompt_ids) > 1


def check_length(length, tokens, context):
  """Raises InputError where a prompt of `length` tokens and `tokens` after it are too many."""
  if tokens < 1:
    raise InputError(f'{tokens} tokens to generate; give 1 or more')
  if length + tokens > context:
    raise InputError(f'a prompt of {length} tokens and {tokens} to generate are {length + tokens}, '
                     f'the context has {context}; shorten or truncate the prompt, or generate '
                     'fewer')


def begun(module, prompts, before=0):
  """What a model reads before it writes; `before` tokens stand before every source.

  Returns:
    the source, [B R] filled up to a length for which there is one program, and the length of each
    row, [B]; None for a decoder; and the beginning of each text that it writes.

  Raises:
    InputError: a source longer than the encoder reads.
  """
  if 'decoder_tokens' not in module.inputs:
    return None, prompts
  c, lengths = module.config, [len(p) for p in prompts]
  longest, most = max(lengths), c.encoder.context - before
  if longest > most:
    raise InputError(f'a source of {longest} tokens, the model reads {most} at most; shorten or '
                     'truncate it')
  source = np.zeros((len(prompts), bucket(longest, most)), np.int32)
  for row, prompt in zip(source, prompts):
    row[:len(prompt)] = prompt
  start = np.array([c.start] if c.first is None else [c.start, c.first], np.int32)
  return (jnp.asarray(source), jnp.array(lengths, jnp.int32)), [start] * len(prompts)
