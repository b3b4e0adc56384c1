"""Speculative decoding: a small model drafts a few tokens, the large one checks them all at once.

Leviathan et al. 2023 (arXiv:2211.17192, algorithm 1) and Chen et al. 2023 (arXiv:2302.01318,
algorithm 2). p is the large model's distribution of the next token, q the draft's, after the
settings of sampling: a drafted token x is kept with probability min(1, p(x) / q(x)), and the first
one that is not is replaced by one from max(0, p - q), scaled to a distribution. The text is then
distributed as the large model's own; without sampling it is the large model's own.

Rows of a batch advance together, by as many tokens as all of them keep. A row that kept more writes
its next drafted token in the place of the others' replacement: each row's tokens up to there are
what it would have written alone, since where it is cut does not depend on what comes after.

What attention has cached of tokens that were not kept is overwritten before it is seen. A state
(Mamba, LSTM) cannot be taken back: such a model reads the kept tokens again, from the state before.
"""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from lean_jax.errors import InputError
from lean_jax.generation import loop
from lean_jax.generation.sampling import drawn, most_probable, shaped
from lean_jax.models.cache import empty_cache
from lean_jax.nn.rope_scaling import Dynamic


class Draft(struct.PyTreeNode):
  """What a draft has seen, and how good it was.

  Attributes:
    cache: the draft's, of the tokens before the last.
    proposed, kept: tokens, of all rows that had not ended.
  """
  cache: Any
  proposed: Any
  kept: Any


@functools.partial(jax.jit, static_argnames=('module', 'padded', 'copies'))
def opened(module, params, ids, start, length, *, padded, copies):
  """The Draft that has read the prompts, ids[:, :length]; arguments as `loop.prefill` has them."""
  ids = jnp.minimum(ids, module.config.vocabulary - 1)             # see `forward`
  _, cache = loop.read(module, params, ids[::copies], start[::copies], length, None, None, padded)
  zero = jnp.zeros((), jnp.int32)
  return Draft(loop.repeated(module.config, cache, copies), zero, zero)


@functools.partial(jax.jit, static_argnames=('module', 'small', 'ahead'),
                   donate_argnames=('state', 'draft'))
def decode(module, params, small, small_params, state, draft, end, sampling, ends, *, ahead):
  """Puts tokens at [:, at:end] and up to `ahead` more, some at a time.

  Args:
    module, params: the decoder whose text it is.
    small, small_params: the decoder that drafts.
    state: a `loop.State`; its ids have room for `ahead` tokens after `end`.
    draft: a Draft.
    end: where to stop.
    sampling, ends: as `loop.prefill` takes them.
    ahead: tokens of a draft.

  Returns:
    state, draft.
  """
  def step(both):
    state, draft = both
    keys = block_keys(state, ahead)
    ids, q, seen, small_cache = drafted(small, small_params, state, draft.cache, sampling,
                                        keys, ahead, module.config.vocabulary)
    block = jax.lax.dynamic_slice_in_dim(ids, state.at - 1, ahead + 1, axis=1)
    logits, cache = forward(module, params, block, state.cache, state.at - 1)
    logits = jax.vmap(lambda x, s: shaped(x, sampling, s), 1, 1)(logits, seen)
    own, replacements = compared(block[:, 1:], logits, q, sampling, keys)
    given, m, ended, kept = together(block[:, 1:], own, replacements, state, ends)
    ids = jax.lax.dynamic_update_slice_in_dim(ids, given, state.at, axis=1)
    real = jnp.broadcast_to(jnp.arange(ahead + 1)[None] <= m, given.shape)
    read_again = lambda which, weights, before: forward(
        which, weights, jax.lax.dynamic_slice_in_dim(ids, state.at - 1, ahead + 1, axis=1), before,
        state.at - 1, real)[1]
    if has_state(module.config):
      cache = read_again(module, params, state.cache)
    if has_state(small.config):
      small_cache = read_again(small, small_params, draft.cache)
    if state.seen is not None:
      rows = jnp.arange(given.shape[0])[:, None]
      state = state.replace(seen=state.seen.at[rows, given].max(real))
    proposed = draft.proposed + ahead * jnp.sum(~state.ended)
    return (state.replace(ids=ids, at=state.at + m + 1, ended=ended, cache=cache),
            Draft(small_cache, proposed, draft.kept + kept))
  going = lambda both: (both[0].at < end) & ~jnp.all(both[0].ended)
  return jax.lax.while_loop(going, step, (state, draft))


def forward(module, params, tokens, cache, offset, mask=None):
  """Logits [B T V] and the cache."""
  # A draft with a shorter table reads its last token for one that it lacks.
  tokens = jnp.minimum(tokens, module.config.vocabulary - 1)
  x, cache = module.apply({'params': params}, tokens, cache, offset, mask, method='hidden')
  return module.apply({'params': params}, x, method='logits'), cache


def block_keys(state, ahead):
  """[ahead + 2, B] keys: of each drafted token, of what is kept, of the replacement; or None."""
  if state.keys is None:
    return None
  keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.at - state.first)
  return jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, ahead + 2))(keys), 0, 1)


def drafted(small, params, state, cache, sampling, keys, ahead, vocabulary):
  """What the draft proposes.

  Returns:
    ids with drafted tokens at [:, at:at + ahead];
    q [B ahead V], the logits that they are drawn from;
    [B ahead+1 V] bool, which tokens a row has before each place, the one after the draft included;
      None where that does not matter;
    the draft's cache, with all the drafted tokens in it.
  """
  def one(carry, k):
    ids, seen, cache = carry
    at = state.at + k
    tokens = jax.lax.dynamic_slice_in_dim(ids, at - 1, 1, axis=1)
    logits, cache = forward(small, params, tokens, cache, at - 1)
    logits = shaped(fitted(logits[:, 0], vocabulary), sampling, seen)
    token = most_probable(logits) if keys is None else drawn(logits, keys[k])
    after = None if seen is None else seen.at[jnp.arange(token.shape[0]), token].set(True)
    ids = jax.lax.dynamic_update_slice_in_dim(ids, token[:, None], at, axis=1)
    return (ids, after, cache), (logits, seen)
  # One step more than tokens: so that the last of them is in the cache too.
  (ids, _, cache), (q, seen) = jax.lax.scan(one, (state.ids, state.seen, cache),
                                            jnp.arange(ahead + 1))
  seen = None if seen is None else jnp.moveaxis(seen, 0, 1)
  return ids, jnp.moveaxis(q, 0, 1)[:, :ahead], seen, cache


def fitted(logits, vocabulary):
  """Logits [B V] of a draft whose table is padded to another length than `vocabulary`."""
  extra = vocabulary - logits.shape[1]
  return logits[:, :vocabulary] if extra <= 0 else jnp.pad(
      logits, ((0, 0), (0, extra)), constant_values=-jnp.inf)


def compared(tokens, p, q, sampling, keys):
  """Which drafted tokens are kept, and what comes in the place of the first that is not.

  Args:
    tokens: [B ahead], drafted.
    p: [B ahead+1 V], the large model's logits at their places and after.
    q: [B ahead V], the draft's.
    sampling: a Sampling.
    keys: of `block_keys`.

  Returns:
    [B], how many of a row's first tokens are kept; and the function from a place, scalar, to the
    tokens [B] that come there instead, or after all.
  """
  ahead = tokens.shape[1]
  if sampling.temperature is None:
    best = jax.vmap(most_probable, 1, 1)(p)
    return leading(tokens == best[:, :ahead]), lambda m: best[:, m]
  p, q = jax.nn.softmax(p), jax.nn.softmax(q)
  of = lambda x: jnp.take_along_axis(x[:, :ahead], tokens[:, :, None], axis=2)[:, :, 0]
  chance = jax.vmap(lambda key: jax.random.uniform(key, (ahead,)))(keys[ahead])
  q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))                         # nothing is drafted after them

  def replacements(m):
    rest = jnp.maximum(p[:, m] - q[:, m], 0)
    # Distributions that differ by roundings alone leave nothing: then any of p will do.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p[:, m])
    return drawn(jnp.log(rest), keys[ahead + 1])
  return leading(chance * of(q) < of(p)), replacements


def leading(kept):
  """[B]: how many of kept [B ahead] are True before the first that is not."""
  return jnp.sum(jnp.cumprod(kept, axis=1), axis=1)


def together(tokens, own, replacements, state, ends):
  """What all rows write.

  Args:
    tokens: [B ahead], drafted.
    own: [B], how many of them each row keeps.
    replacements: of `compared`.
    state: before.
    ends: [E].

  Returns:
    [B ahead+1], of which the first m + 1 count; m, a scalar; which rows have ended then, [B]; how
    many drafted tokens were kept.
  """
  ahead = tokens.shape[1]
  place = jnp.arange(ahead)[None]
  # Rows at their end hold no others back.
  over = state.ended | jnp.any(loop.among(tokens, ends) & (place < own[:, None]), axis=1)
  m = jnp.min(jnp.where(over, ahead, own))
  place = jnp.arange(ahead + 1)[None]
  more = jnp.pad(tokens, ((0, 0), (0, 1)))
  last = jnp.where(own > m, more[:, m], replacements(m))
  given = jnp.where(place < m, more, last[:, None])
  ending = loop.among(given, ends) & (place <= m)
  first = jnp.argmax(ending, axis=1)[:, None]
  after = jnp.any(ending, axis=1, keepdims=True) & (place > first)
  given = jnp.where(after, jnp.take_along_axis(given, first, axis=1), given)
  before = jax.lax.dynamic_slice_in_dim(state.ids, state.at - 1, 1, axis=1)
  given = jnp.where(state.ended[:, None], before, given)
  kept = jnp.sum(jnp.where(state.ended, 0, jnp.minimum(own, m)))
  return given, m, state.ended | jnp.any(ending, axis=1), kept


@functools.lru_cache
def has_state(config):
  """Whether what a model keeps of a text is not only a place for each token."""
  config = dataclasses.replace(config, cache=None)       # whole groups of places, as they are taken
  short, long = (jax.eval_shape(lambda n=n: empty_cache(config, 1, n)) for n in (8, 9))
  return any(a.shape == b.shape for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(long)))


def check(module, small, start, end, ahead):
  """Raises InputError where one model cannot draft for the other.

  Args:
    module, small: the models.
    start, end: tokens of the longest prompt, and with all that is written.
    ahead: tokens of a draft.
  """
  if ahead < 1 or ahead != int(ahead):
    raise InputError(f'{ahead} tokens ahead; give a whole number, 1 or more')
  if any('decoder_tokens' in m.inputs for m in (module, small)):
    raise InputError('drafts are for decoders; an encoder and a decoder writes without one')
  if end > small.config.context:
    raise InputError(f'the prompt and the tokens to generate are {end}, the context of the draft '
                     f'has {small.config.context}; generate fewer, or leave the draft out')
  for config in (module.config, small.config):
    lengths = [n for n in config.renewals if start <= n < end + ahead] + [
        rope.scaling.original for rope in config.attention.ropes
        if isinstance(rope.scaling, Dynamic) and rope.scaling.original < end + ahead]
    if lengths:
      raise InputError(f'a draft of texts longer than {min(lengths)} tokens, from which on the '
                       'positions of a model turn by other angles; generate fewer, or leave the '
                       'draft out')
