"""A softmax over tokens that come in parts (Milakov and Gimelshein 2018, arXiv:1805.02867)."""
from typing import Any, NamedTuple

import jax.numpy as jnp


class Scores(NamedTuple):
  """What scores are of products of queries and keys; hashable.

  Attributes:
    bits: of a code.
    scale: of the products.
    softcap: None, or the bound that tanh puts on them.
  """
  bits: int
  scale: float
  softcap: float | None

  def of(self, products):
    """Scores of products."""
    x = products * self.scale
    return x if self.softcap is None else self.softcap * jnp.tanh(x / self.softcap)


class Part(NamedTuple):
  """Attention to some of the tokens.

  Attributes:
    mixed: [... R K], values times exp(score - top), summed.
    top: [... R 1], the greatest score, or a very small number.
    total: [... R 1], the sum of exp(score - top).
  """
  mixed: Any
  top: Any
  total: Any


def nothing(shape, dtype):
  """The Part [... R K] of no tokens."""
  column = (*shape[:-1], 1)
  return Part(jnp.zeros(shape, dtype), jnp.full(column, jnp.finfo(dtype).min),
              jnp.zeros(column, dtype))


def more(part, scores, visible, mix):
  """The Part with further tokens.

  Args:
    part: a Part, in float32.
    scores: list of [... R S], float32.
    visible: list of [... 1 S] bool, alike: which of them count.
    mix: a function from the list of exp(score - top) to values weighted by them, [... R K].
  """
  least = jnp.finfo(part.top.dtype).min
  scores = [jnp.where(s, x, least) for s, x in zip(visible, scores)]
  top = part.top
  for x in scores:
    top = jnp.maximum(top, jnp.max(x, axis=-1, keepdims=True))
  probs = [jnp.where(s, jnp.exp(x - top), 0) for s, x in zip(visible, scores)]
  fade = jnp.exp(part.top - top)
  total = fade * part.total + sum(jnp.sum(p, axis=-1, keepdims=True) for p in probs)
  return Part(fade * part.mixed + mix(probs), top, total)


def result(part, sinks=None):
  """[... R K], of all tokens; zeros where there are none. sinks: None, or [... R]."""
  total = part.total
  if sinks is not None:
    # A sink above all scores would overflow by exp(sink - top): both shrink then.
    sink = sinks.astype(total.dtype)[..., None]
    top = jnp.maximum(part.top, sink)
    fade = jnp.exp(part.top - top)
    return part.mixed * fade / (total * fade + jnp.exp(sink - top))
  return jnp.where(total == 0, 0, part.mixed / total)
