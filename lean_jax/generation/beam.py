"""Beam search: the most probable texts, as far as a few candidates at a time find them.

Candidates are taken and compared as transformers does: of all continuations of the K beams the
best are kept, K of those that go on and those among the first K that end; an ended text's score is
its log-probability over length ** length_penalty (Wu et al. 2016, arXiv:1609.08144, section 7, has
the idea).
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lean_jax.errors import InputError
from lean_jax.generation import loop
from lean_jax.generation.caches import cache_bytes, with_cache
from lean_jax.generation.prompts import begun, check_length
from lean_jax.generation.sampling import penalized
from lean_jax.generation.writer import renewals, written_out
from lean_jax.models.prefix import length_of, source_prompt

_NEVER = -1e9                 # the score of what is no candidate


class Beams(struct.PyTreeNode):
  """Texts of B prompts that are being searched for, K of each.

  Attributes:
    ids: [B K S], the beams; scores: [B K], their log-probabilities, the best first.
    found, lengths, found_scores: [B K S], [B K], [B K]: texts that ended, how many tokens each has
      in all, their scores, the best first.
    done: [B], where no beam can become better than the found texts.
    stuck: scalar, whether all continuations end.
    at: the place of the next token; scalar.
    cache: of B * K rows.
  """
  ids: Any
  scores: Any
  found: Any
  lengths: Any
  found_scores: Any
  done: Any
  stuck: Any
  at: Any
  cache: Any


class Rules(struct.PyTreeNode):
  """What a search keeps to.

  Attributes:
    first, end: the places of the first and after the last token.
    ends: [E], tokens that end a text.
    length_penalty, early_stopping, repetition_penalty: see `search`.
    last: the token that ends a text that is as long as can be; None where the model chooses.
  """
  first: Any
  end: Any
  ends: Any
  length_penalty: Any
  early_stopping: Any
  repetition_penalty: Any
  last: Any


def search(module, params, prompts, **settings):
  """The ids and lengths of `searched`."""
  return searched(module, params, prompts, **settings)[:2]


def searched(module, params, prompts, *, tokens, beams, ends=(), length_penalty=1.,
             early_stopping=False, repetition_penalty=None, cache=None):
  """The best texts that follow prompts, or the best targets of sources.

  Args:
    module, params, prompts, tokens, ends: as `Writer` takes them.
    beams: K, candidates; 1 is greedy.
    length_penalty: above 0 favours long texts, below 0 short ones.
    early_stopping: whether a prompt is done once K texts have ended; else it is once no beam, at
      its present length, is better than the worst of them.
    repetition_penalty: see `sampling.Sampling`; applied to log-probabilities.
    cache: how keys and values are kept, see `caches`.

  Returns:
    ids [B K n], int32, without prompts, the best text first; the length of each, [B K]; and the
    bytes of the cache.

  Raises:
    InputError: a setting out of its range, more tokens than the context has, a context within
      which positions turn by other angles (LongRoPE), or a cache that the model cannot have.
  """
  module = with_cache(module, cache)
  config = module.config
  check(config, beams, length_penalty, repetition_penalty)
  module, params = written_out(module, params)
  source, beginnings = begun(module, prompts, source_prompt(params))
  longest = max(map(len, beginnings))
  first = longest if source is None else 1
  end = first + tokens
  check_length(first + length_of(params), tokens, config.context)
  if renewals(config, longest, end):
    raise InputError(f'beams longer than {config.decoding.renewals[0]} tokens, past which this '
                     'model turns all positions otherwise; generate fewer, or without beams')
  state = loop.begin(beginnings, loop.bucket(end, config.context))
  read = {} if source is None else dict(zip(('source', 'lengths'), source))
  # How many may end at a step, and beams are left: what transformers keeps of continuations.
  kept = beams * max(2, 1 + len(ends))
  rules = Rules(first, end, np.asarray(ends, np.int32), length_penalty, early_stopping,
                repetition_penalty, getattr(config, 'last', None))
  out = _search(module, params, state, rules, **read, beams=beams,
                kept=min(kept, beams * config.vocabulary),
                padded=loop.bucket(longest, config.context) if source is None else longest)
  found, lengths = (np.asarray(x) for x in out)
  held = cache_bytes(config, len(beginnings) * beams, state.ids.shape[1],
                     0 if source is None else source[0].shape[1] + source_prompt(params))
  return found[:, :, first:lengths.max()], lengths - first, held


@functools.partial(jax.jit, static_argnames=('module', 'beams', 'kept', 'padded'))
def _search(module, params, state, rules, source=None, lengths=None, *, beams, kept, padded):
  config = module.config
  logits, cache = loop.read(module, params, state.ids, state.start, state.at, source, lengths,
                            padded)
  x = opened(state, loop.repeated(config, cache, beams), beams)
  starts = jnp.repeat(state.start, beams)

  def chosen(x, logits):
    B, K, _ = x.ids.shape
    scores = scored(x, logits, starts, rules).reshape(B, K, -1)
    x, parents = advanced(x, scores, rules, kept)
    rows = (jnp.arange(B)[:, None] * K + parents).reshape(-1)
    return x.replace(cache=loop.by_rows(config, x.cache, rows))

  def step(x):
    tokens = jax.lax.dynamic_slice_in_dim(x.ids, x.at - 1, 1, axis=2).reshape(-1, 1)
    h, cache = module.apply({'params': params}, tokens, x.cache, x.at - 1, method='hidden')
    logits = module.apply({'params': params}, h, method='logits')[:, 0]
    return chosen(x.replace(cache=cache), logits)

  going = lambda x: (x.at < rules.end) & ~x.stuck & ~jnp.all(x.done) & ~jnp.all(full(x, rules))
  x = jax.lax.while_loop(going, step, chosen(x, jnp.repeat(logits, beams, axis=0)))
  return x.found, x.lengths


def opened(state, cache, beams):
  """The Beams of prompts that were read: all beams are the same, so only the first one counts."""
  B, _ = state.ids.shape
  scores = jnp.full((B, beams), _NEVER)
  ids = jnp.repeat(state.ids[:, None], beams, axis=1)
  return Beams(ids, scores.at[:, 0].set(0), ids, jnp.full((B, beams), state.at), scores,
               jnp.zeros((B,), bool), jnp.zeros((), bool), state.at, cache)


def scored(x, logits, starts, rules):
  """Log-probabilities [B * K, V] of each next token, of logits of that shape."""
  (B, K, S), scores = x.ids.shape, jax.nn.log_softmax(logits)
  if rules.repetition_penalty is not None:
    texts = loop.State(x.ids.reshape(B * K, S), starts, rules.first, x.at, None)
    seen = loop.tokens_of(texts, logits.shape[1])
    scores = penalized(scores, rules.repetition_penalty, seen)
  if rules.last is not None:
    only = jnp.where(jnp.arange(logits.shape[1]) == rules.last, 0., -jnp.inf)
    scores = jnp.where(x.at == rules.end - 1, only[None], scores)
  return scores


def full(x, rules):
  """[B], where a prompt has all its texts and is to stop then."""
  return jnp.all(x.found_scores > _NEVER / 2, axis=1) & rules.early_stopping


def advanced(x, scores, rules, kept):
  """The Beams with a token more, and which beam each comes from, [B K].

  Args:
    x: Beams.
    scores: [B K V], of each next token.
    rules: Rules.
    kept: how many continuations are looked at.
  """
  B, K, _ = x.ids.shape
  V = scores.shape[-1]
  total, index = jax.lax.top_k((scores + x.scores[:, :, None]).reshape(B, K * V), kept)
  parents, tokens = index // V, index % V                                     # [B kept] each
  ids = jnp.take_along_axis(x.ids, parents[:, :, None], axis=1)
  ids = jax.lax.dynamic_update_slice_in_dim(ids, tokens[:, :, None], x.at, axis=2)
  ending = loop.among(tokens, rules.ends) | (x.at == rules.end - 1)
  length = (x.at + 1 - rules.first).astype(jnp.float32) ** rules.length_penalty

  ended = ending & (jnp.arange(kept) < K)[None] & ~(x.done | full(x, rules))[:, None]
  candidates = jnp.where(ended, total / length, _NEVER)
  best, order = jax.lax.top_k(jnp.concatenate([x.found_scores, candidates], axis=1), K)
  pick = lambda a, b: jnp.take_along_axis(
      jnp.concatenate([a, b], axis=1), order.reshape(order.shape + (1,) * (a.ndim - 2)), axis=1)
  scores, on = jax.lax.top_k(jnp.where(ending, total + _NEVER, total), K)
  better = scores[:, 0] / length > best[:, -1]
  return x.replace(
      ids=jnp.take_along_axis(ids, on[:, :, None], axis=1), scores=scores,
      found=pick(x.found, ids), lengths=pick(x.lengths, jnp.full((B, kept), x.at + 1)),
      found_scores=best, done=x.done | ~better, stuck=jnp.all(ending), at=x.at + 1,
  ), jnp.take_along_axis(parents, on, axis=1)


def check(config, beams, length_penalty, repetition_penalty):
  """Raises InputError for the first setting out of its range."""
  if beams < 1 or beams != int(beams) or beams > config.vocabulary:
    raise InputError(f'beams {beams}; give a whole number from 1 to {config.vocabulary}, the '
                     'vocabulary')
  if not abs(length_penalty) < float('inf'):
    raise InputError(f'length_penalty {length_penalty}; give a number, 1 for none')
  if repetition_penalty is not None and not 0 < repetition_penalty < float('inf'):
    raise InputError(f'repetition_penalty {repetition_penalty}; give more than 0, or leave it out')
