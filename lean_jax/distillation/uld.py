"""Distillation between models with different tokenizers: universal logit distillation.

No token of one vocabulary stands for one of the other, so that distributions are compared by their
sorted probabilities: the L1 distance of these is the Wasserstein distance where all tokens are as
far from each other. Boizard et al. 2024 (ULD, arXiv:2402.12030), section 3, compares the two
tokenizations of a text position by position. Over a text they drift apart; GOLD (Hugging Face 2025,
`trl.experimental.gold`) compares spans instead, from one place where a token of both ends to the
next.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

ALIGN = ('positions', 'spans')
ENTRIES = 2 ** 24             # of logits in memory at a time


class Reading(NamedTuple):
  """A model on a text, by its own tokens.

  Attributes:
    states: [B T D], what `logits` takes rows of, [M D], to give [M V].
    logits: the function.
    tokens: [B T], integer: the token after each.
    units: [B T], integer: the unit of text that this token is of; -1 where it counts for nothing.
      Units are numbered from 0 in their order; `unpredicted` are whole only with a token that
      nothing predicts.
    unpredicted: [B], a unit, or -1.
    several: whether a unit may be of several tokens.
  """
  states: Any
  logits: Callable
  tokens: Any
  units: Any
  unpredicted: Any
  several: bool = False


def reading(states, logits, batch, counted, align):
  """The Reading of a batch.

  Args:
    batch: its tokens [B T]; and where the other model reads other tokens `spans` [B T]: the span of
      each token, -1 for those that stand for no text.
    counted: [B T], 1 where the token after each is real; its own where there are no spans.
    align: of `ALIGN`. Without spans both are the same: a unit is a token.
  """
  tokens = batch['decoder_tokens' if 'decoder_tokens' in batch else 'tokens']
  T = tokens.shape[1]
  spans = batch.get('spans')
  following = jnp.roll(tokens, -1, axis=1)
  if spans is None:
    return Reading(states, logits, following, jnp.where(counted > 0, jnp.arange(T)[None], -1),
                   jnp.full(tokens.shape[:1], -1))
  text = spans >= 0
  if align == 'positions':
    spans = jnp.where(text, jnp.cumsum(text, axis=1) - 1, -1)
  last = jnp.arange(T)[None] == T - 1
  return Reading(states, logits, following, jnp.where(last, -1, jnp.roll(spans, -1, axis=1)),
                 spans[:, 0], align == 'spans')


def uld(student, teacher, temperature=1.):
  """The L1 distance of sorted probabilities, summed over the vocabulary, the mean over units.

  The lesser vocabulary is filled up with zeros (equation 5 of ULD). The distribution of a unit of
  several tokens is that of its first one, times the probabilities of the others that are there, by
  the chain rule: that of the text itself is then the product that the model gives it (GOLD's
  merging of probabilities). No gradient reaches the teacher.

  Args:
    student, teacher: Readings of the same texts.
    temperature: of both.

  Returns:
    float32, 0 to 2; 0 where no unit counts.
  """
  teacher = teacher._replace(states=jax.lax.stop_gradient(teacher.states))
  S = min(student.units.shape[1], teacher.units.shape[1])
  (at_s, chain_s), (at_t, chain_t) = (_units(x, S, temperature) for x in (student, teacher))
  chain_t = jax.lax.stop_gradient(chain_t)
  slots = jnp.arange(S)[None]
  counts = ((at_s < student.units.shape[1]) & (at_t < teacher.units.shape[1])
            & (slots != student.unpredicted[:, None]) & (slots != teacher.unpredicted[:, None]))

  def distance(at_s, chain_s, at_t, chain_t):
    q, p = (jnp.exp(_log_probs(x, at, temperature) + chain[..., None]) for x, at, chain in (
        (student, at_s, chain_s), (teacher, at_t, chain_t)))
    return sorted_distance(q, jax.lax.stop_gradient(p))
  each = _in_blocks(distance, (at_s, chain_s, at_t, chain_t), _block(student, teacher))
  return jnp.sum(jnp.where(counts, each, 0)) / jnp.maximum(jnp.sum(counts), 1)


def sorted_distance(q, p):
  """The sum of |sorted q - sorted p|, [...], of probabilities [... V] and [... W]."""
  q, p = (jnp.sort(x, axis=-1, descending=True) for x in (q, p))
  V, W = q.shape[-1], p.shape[-1]
  both = min(V, W)
  rest = jnp.sum(q[..., both:], axis=-1) + jnp.sum(p[..., both:], axis=-1)
  return jnp.sum(jnp.abs(q[..., :both] - p[..., :both]), axis=-1) + rest


def _units(x, S, temperature):
  """Where each of S units is predicted first, [B S], T where nowhere; and the log probability of
  its other tokens, [B S].
  """
  B, T = x.units.shape
  rows, at = jnp.arange(B)[:, None], jnp.arange(T)[None]
  slot = jnp.where(x.units < 0, S, x.units)                        # S is left out
  first = jnp.full((B, S), T).at[rows, slot].min(at, mode='drop')
  if not x.several:
    return first, jnp.zeros((B, S))
  start = jnp.take_along_axis(first, jnp.clip(slot, 0, S - 1), axis=1)
  others = (slot < S) & (at != start)

  def log_prob(at, token):
    return jnp.take_along_axis(_log_probs(x, at, temperature), token[..., None], axis=-1)[..., 0]
  each = _in_blocks(log_prob, (jnp.broadcast_to(at, (B, T)), x.tokens), _block(x))
  return first, jnp.zeros((B, S)).at[rows, slot].add(jnp.where(others, each, 0), mode='drop')


def _log_probs(x, at, temperature):
  """log softmax of the logits of a Reading at places [B C]: [B C V]."""
  B, C = at.shape
  T, D = x.states.shape[1:]
  states = jnp.take_along_axis(x.states, jnp.minimum(at, T - 1)[..., None], axis=1)
  logits = x.logits(states.reshape(-1, D)).astype(jnp.float32)
  return jax.nn.log_softmax(logits / temperature).reshape(B, C, -1)


def _block(*readings):
  """Places at a time whose logits are `ENTRIES` or fewer."""
  widest = max(jax.eval_shape(x.logits, x.states[:, 0]).size for x in readings)
  return max(1, ENTRIES // widest)


def _in_blocks(f, arrays, block):
  """f of arrays [B N], some places [B C] at a time; the backward pass computes it again."""
  B, N = arrays[0].shape
  if block >= N:
    return f(*arrays)
  count = -(-N // block)
  cut = lambda x: jnp.pad(x, ((0, 0), (0, count * block - N))).reshape(
      B, count, block).swapaxes(0, 1)
  out = jax.lax.map(lambda own: jax.checkpoint(f)(*own), tuple(map(cut, arrays)))
  return out.swapaxes(0, 1).reshape(B, -1)[:, :N]
