"""The choice of a token from logits."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lean_jax.errors import InputError

_ROW = 128                    # tokens among which the second of two draws chooses


class Sampling(struct.PyTreeNode):
  """How a token is chosen; None leaves a step out. Numbers, or [B] for each row its own.

  Logits are penalised, divided by the temperature, and cut by top_k, top_p and min_p, in this
  order; what is left is sampled. Cuts keep tokens that are as probable as the last one kept.

  Attributes:
    temperature: > 0, divides the logits; None takes the most probable token.
    top_k: so many of the most probable tokens are kept (Fan et al. 2018, arXiv:1805.04833, section
      5); one number for all rows.
    top_p: the fewest most probable tokens that together have this probability are kept (Holtzman
      et al. 2019, arXiv:1904.09751, section 3.1).
    min_p: tokens are kept that are this many times as probable as the most probable one (Nguyen et
      al. 2024, arXiv:2407.01082).
    repetition_penalty: logits of tokens that the text has already are divided by it where they are
      positive, multiplied where negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1).
  """
  temperature: Any = None
  top_k: int | None = struct.field(pytree_node=False, default=None)
  top_p: Any = None
  min_p: Any = None
  repetition_penalty: Any = None


def checked(temperature=0., top_k=None, top_p=None, min_p=None, repetition_penalty=None):
  """The Sampling of a user's settings: temperature 0 takes the most probable token.

  Raises:
    InputError: a setting out of its range, or one that only sampling has, at temperature 0.
  """
  if not 0 <= temperature < float('inf'):
    raise InputError(f'temperature {temperature}; give 0 for the most probable token, or more')
  if top_k is not None and (top_k < 1 or top_k != int(top_k)):
    raise InputError(f'top_k {top_k}; give a whole number, 1 or more, or leave it out')
  for name, value in dict(top_p=top_p, min_p=min_p).items():
    if value is not None and not 0 < value <= 1:
      raise InputError(f'{name} {value}; give more than 0 and at most 1, or leave it out')
  if repetition_penalty is not None and not 0 < repetition_penalty < float('inf'):
    raise InputError(f'repetition_penalty {repetition_penalty}; give more than 0, above 1 for '
                     'fewer repetitions, or leave it out')
  if temperature > 0:
    return Sampling(temperature, None if top_k is None else int(top_k), top_p, min_p,
                    repetition_penalty)
  for name, value in dict(top_k=top_k, top_p=top_p, min_p=min_p).items():
    if value is not None:
      raise InputError(f'{name} {value} at temperature 0, which takes the most probable token; '
                       'give a temperature above 0')
  return Sampling(repetition_penalty=repetition_penalty)


def sample(logits, keys, sampling, seen=None):
  """Token ids [B] of logits [B V].

  Args:
    logits: float32.
    keys: [B] jax PRNG keys, a row's own; unused without a temperature.
    sampling: a Sampling.
    seen: [B V] bool, which tokens each row's text has; needed with a repetition penalty.
  """
  logits = shaped(logits, sampling, seen)
  return most_probable(logits) if sampling.temperature is None else drawn(logits, keys)


def shaped(logits, sampling, seen=None):
  """The logits [B V] of what `sample` draws from: -inf where a token is cut."""
  logits = penalized(logits, sampling.repetition_penalty, seen)
  if sampling.temperature is None:
    return logits
  # Less their maximum, logits divided by a tiny temperature end at -inf, never at nan.
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / _column(sampling.temperature)
  if sampling.top_k is not None:
    least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]      # [B 1]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if sampling.top_p is not None:
    logits = nucleus(logits, _column(sampling.top_p))
  if sampling.min_p is not None:
    logits = jnp.where(logits < jnp.log(_column(sampling.min_p)), -jnp.inf, logits)
  return logits


def penalized(logits, penalty, seen):
  """Logits [B V] with those of the tokens that are in `seen` [B V] made smaller."""
  if penalty is None:
    return logits
  penalty = _column(penalty)
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def nucleus(logits, top_p):
  """Logits [B V] with all but the fewest most probable tokens of probability top_p at -inf.

  The least probability kept is found bit by bit, as those of positive floats are ordered as the
  floats are: thirty sums, where a sort of the vocabulary would take many times as long.
  """
  probs = jax.nn.softmax(logits)
  bits = jax.lax.bitcast_convert_type(probs, jnp.int32)

  def one(k, least):
    trial = least | (1 << (29 - k))
    mass = jnp.sum(jnp.where(bits >= trial, probs, 0), axis=-1, keepdims=True)
    return jnp.where(mass >= top_p, trial, least)
  least = jax.lax.fori_loop(0, 30, one, jnp.zeros((logits.shape[0], 1), jnp.int32))
  return jnp.where(bits < least, -jnp.inf, logits)


def most_probable(logits):
  """The first largest of logits [B V]: as argmax, but made of reductions that are vectorised."""
  V = logits.shape[-1]
  largest = jnp.max(logits, axis=-1, keepdims=True)
  at = jnp.where(logits == largest, jnp.arange(V)[None], V - 1)
  return jnp.min(at, axis=-1)


def drawn(logits, keys):
  """Tokens [B] drawn from softmax(logits) [B V], each row by its own key.

  Of rows of the vocabulary first, then within the row: two numbers, not one for every token.
  """
  B, V = logits.shape
  rows = -(-V // _ROW)
  weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.pad(weights, ((0, 0), (0, rows * _ROW - V))).reshape(B, rows, _ROW)
  chance = jax.vmap(lambda key: jax.random.uniform(key, (2, 1)))(keys)                   # [B 2 1]
  row = _inverse(jnp.sum(weights, axis=-1), chance[:, 0])
  within = jnp.take_along_axis(weights, row[:, None, None], axis=1)[:, 0]
  return row * _ROW + _inverse(within, chance[:, 1])


def _inverse(weights, chance):
  """The first place [B] where the sum of weights [B n] passes `chance` [B 1] of the whole."""
  sums = jnp.cumsum(weights, axis=-1)
  place = jnp.sum(sums <= chance * sums[:, -1:], axis=-1)
  return jnp.minimum(place, weights.shape[-1] - 1)


def _column(value):
  """A number as [1 1], or [B] as [B 1]."""
  return jnp.reshape(jnp.asarray(value, jnp.float32), (-1, 1))
