"""One vector of a text, of its tokens' hidden states."""
import dataclasses

import jax.numpy as jnp

MODES = ('cls', 'max', 'mean', 'mean_sqrt_len_tokens', 'weightedmean', 'lasttoken')


@dataclasses.dataclass(frozen=True)
class Pooling:
  """How a sentence encoder reads a text and makes its vector.

  Attributes:
    modes: names of `MODES`; the vectors of several stand one after the other.
    normalize: whether the vector is brought to length one.
    length: tokens that are read at most, those put around a text included; None where only the
      tokenizer and the context say.
    lower: whether a text is brought to lower case before the tokenizer's own rules.
    prompt: stands before every text.
    described: config_sentence_transformers.json, its text as it was found; '' for none.
  """
  modes: tuple[str, ...] = ('mean',)
  normalize: bool = False
  length: int | None = None
  lower: bool = False
  prompt: str = ''
  described: str = ''


def pooled(x, mask, modes):
  """Vectors of texts, [B, len(modes) D] float32.

  Sums of no token are zero.

  Args:
    x: [B T D], hidden states.
    mask: [B T] bool, which tokens are real; None for all.
    modes: names of `MODES`: the first real token; the largest value of each feature; the mean; the
      sum by the root of the number; the mean weighted by 1, 2, 3, ...; the last real token.
  """
  B, T, _ = x.shape
  x = x.astype(jnp.float32)
  mask = jnp.ones((B, T), bool) if mask is None else mask
  real = mask.astype(jnp.float32)[..., None]                           # [B T 1]
  count = jnp.maximum(jnp.sum(real, axis=1), 1)                        # [B 1]
  at = lambda k: jnp.take_along_axis(x, k[:, None, None], axis=1)[:, 0]
  mean = lambda weight: jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)
  first = jnp.argmax(mask, axis=1)
  number = 1 + jnp.arange(T, dtype=jnp.float32)[None] - first[:, None]
  make = dict(
      cls=lambda: at(first),
      max=lambda: jnp.max(jnp.where(mask[..., None], x, -jnp.inf), axis=1),
      mean=lambda: mean(real),
      mean_sqrt_len_tokens=lambda: mean(real) * jnp.sqrt(count),
      weightedmean=lambda: mean(real * number[..., None]),
      lasttoken=lambda: at(T - 1 - jnp.argmax(mask[:, ::-1], axis=1)))
  return jnp.concatenate([make[mode]() for mode in modes], axis=-1)


def unit(x):
  """Vectors [B D] of length one; zero stays zero."""
  length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  return x / jnp.maximum(length, 1e-12)
