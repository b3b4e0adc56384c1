"""Data without a corpus: what a model writes by itself."""
import hashlib

import jax
import numpy as np

from lean_jax.data.windows import Windows
from lean_jax.errors import InputError
from lean_jax.generation import generate

SURE = 3                      # tokens after the first that are the most probable ones


def written(model, count, *, length, seed=0, batch=64):
  """Windows that a model writes, each from a random token: what LLM-QAT trains on.

  Liu et al. 2023 (arXiv:2305.17888), section 2.1, 'next token data generation' in its hybrid form:
  the first token is drawn from the vocabulary, the next `SURE` are the most probable ones, and the
  others are sampled at temperature 1. The paper ends a text at its end token; a window here is
  full, as the windows of a corpus are.

  Args:
    model: a `lean_jax.Model`, a decoder.
    count: windows, 1 or more.
    length: tokens a window, more than `SURE` + 1 and at most the model's context.
    seed: of the first tokens and of the sampling; with it the windows are the same each time.
    batch: windows that are written at once.

  Returns:
    Windows, its array in memory.

  Raises:
    InputError: no windows, or a length out of range.
  """
  if count < 1 or batch < 1:
    raise InputError(f'{count} windows, {batch} at a time; give 1 or more of both')
  if not SURE + 1 < length <= model.config.context:
    raise InputError(f'windows of {length} tokens from a model that reads {model.config.context}; '
                     f'give {SURE + 2} to {model.config.context}')
  vocabulary = model.tokenizer.size
  starts = np.random.default_rng(seed).integers(0, vocabulary, (count, 1)).astype(np.int32)
  rows, key = [], jax.random.key(seed)
  for at in range(0, count, batch):
    ids = starts[(np.arange(at, at + batch)) % count]    # the last batch is full too: one program
    for tokens, temperature in ((SURE, 0.), (length - SURE - 1, 1.)):
      more = generate(model.module, model.params, ids, tokens=tokens, temperature=temperature,
                      key=jax.random.fold_in(key, at))
      ids = np.concatenate([ids, more], axis=1)
    rows.append(ids)
  array = np.concatenate(rows)[:count]
  # Ids beyond the tokenizer fill up a vocabulary and have no text.
  text = sum(len(model.tokenizer.decode(np.minimum(row, vocabulary - 1)).encode()) for row in array)
  digest = hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()
  return Windows(array, array.size, text, count, digest)
