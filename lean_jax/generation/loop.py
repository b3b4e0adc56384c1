"""The two compiled programs of generation: the prompts' forward pass, and the loop after it.

Rows of different lengths end at the same place: ids [B S] hold each row's prompt from its `start`
on, all up to one place, and what follows. Padding before a row is masked, and positions count real
tokens, so that a batch is its rows alone. S and the length that is run of a prompt are powers of
two, so that few programs serve all lengths; what is run after the prompts is masked too, and the
loop overwrites each place before a token sees it.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lean_jax.generation.sampling import sample
from lean_jax.models.cache import empty_cache

_LEAST = 16                   # tokens; shorter programs differ too little to compile one for each


class State(struct.PyTreeNode):
  """Texts that are being written.

  Attributes:
    ids: [B S] int32, prompts and what follows them.
    start: [B], the place of each row's first token.
    first: the place of the first token that follows the prompts; scalar.
    at: the place of the next token; scalar.
    ended: [B] bool, which rows are at their end; they are filled with their last token.
    keys: [B] PRNG keys, a row's own; None where nothing is sampled.
    seen: [B V] bool, which tokens a row has; None where that does not matter.
    cache: of the tokens before the last; None before the prompts are read.
  """
  ids: Any
  start: Any
  first: Any
  at: Any
  ended: Any
  keys: Any = None
  seen: Any = None
  cache: Any = None


def bucket(length, context):
  """The padded length: the next power of two, the context at most."""
  return min(context, max(_LEAST, 1 << (length - 1).bit_length()))


def begin(prompts, room, key=None):
  """The State in which nothing is read.

  Args:
    prompts: sequences of ids, each of one token or more.
    room: S, tokens.
    key: a jax PRNG key, from which each row gets its own; None where nothing is sampled.
  """
  B, longest = len(prompts), max(map(len, prompts))
  ids, start = np.zeros((B, room), np.int32), np.zeros((B,), np.int32)
  for row, prompt in enumerate(prompts):
    start[row] = longest - len(prompt)
    ids[row, start[row]:longest] = prompt
  keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(B))
  return State(ids, start, np.int32(longest), np.int32(longest), np.zeros((B,), bool), keys)


@functools.partial(jax.jit, static_argnames=('module', 'padded', 'copies'),
                   donate_argnames=('state',))
def prefill(module, params, state, sampling, ends, source=None, lengths=None, *, padded, copies=1):
  """Reads the texts so far, anew, and puts the next token after them.

  Args:
    module: a decoder, or an encoder and a decoder.
    params: its parameters.
    state: not usable afterwards.
    sampling: a `sampling.Sampling`.
    ends: [E], tokens that end a row; E may be 0.
    source: [B/copies R], what the encoder reads; None without one.
    lengths: [B/copies], how much of each row of the source is real.
    padded: how much of ids is run; `at` or more.
    copies: how many neighbours are the same text, which is read once for all of them.
  """
  logits, cache = read(module, params, state.ids[::copies], state.start[::copies], state.at,
                       source, lengths, padded)
  if copies > 1:
    logits, cache = jnp.repeat(logits, copies, axis=0), repeated(module.config, cache, copies)
  if sampling.repetition_penalty is not None:
    state = state.replace(seen=tokens_of(state, module.config.vocabulary))
  return written(state.replace(cache=cache), logits, sampling, ends)


@functools.partial(jax.jit, static_argnames=('module',), donate_argnames=('state',))
def decode(module, params, state, end, sampling, ends):
  """Puts tokens at [:, at:end], one at a time, until each row has ended.

  Args:
    module: a decoder, or an encoder and a decoder.
    params: its parameters.
    state: from `prefill`; not usable afterwards.
    end: S at most.
    sampling, ends: as in `prefill`.
  """
  def step(state):
    tokens = jax.lax.dynamic_slice_in_dim(state.ids, state.at - 1, 1, axis=1)          # [B 1]
    x, cache = module.apply({'params': params}, tokens, state.cache, state.at - 1, method='hidden')
    logits = module.apply({'params': params}, x, method='logits')[:, 0]
    return written(state.replace(cache=cache), logits, sampling, ends)
  going = lambda state: (state.at < end) & ~jnp.all(state.ended)
  return jax.lax.while_loop(going, step, state)


def read(module, params, ids, start, length, source, lengths, padded):
  """Logits [B V] after ids[:, :length], and the cache of S tokens, as `prefill` needs them."""
  B, S = ids.shape
  at = jnp.arange(padded)[None]
  mask = (start[:, None] <= at) & (at < length)
  given = ()
  if source is not None:
    real = jnp.arange(source.shape[1])[None] < lengths[:, None]
    given = (module.apply({'params': params}, source, real, method='encode'), real)
  cache = empty_cache(module.config, B, S, 0 if source is None else given[0].shape[1])
  x, cache = module.apply({'params': params}, ids[:, :padded], cache, 0, mask, *given,
                          method='hidden')
  last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1, axis=1)    # no other position needs logits
  return module.apply({'params': params}, last, method='logits')[:, 0], cache


def written(state, logits, sampling, ends):
  """The State with the next token of each row, of logits [B V]."""
  keys = None if state.keys is None else jax.vmap(jax.random.fold_in, (0, None))(
      state.keys, state.at - state.first)
  token = sample(logits, keys, sampling, state.seen)
  last = jax.lax.dynamic_slice_in_dim(state.ids, state.at - 1, 1, axis=1)[:, 0]
  token = jnp.where(state.ended, last, token)
  rows = jnp.arange(token.shape[0])
  return state.replace(
      ids=jax.lax.dynamic_update_slice_in_dim(state.ids, token[:, None], state.at, axis=1),
      at=state.at + 1, ended=state.ended | among(token, ends),
      seen=None if state.seen is None else state.seen.at[rows, token].set(True))


def among(tokens, ends):
  """Which of tokens [...] are in ends [E]."""
  return jnp.any(tokens[..., None] == ends.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def tokens_of(state, vocabulary):
  """[B V] bool: the tokens that each row of a State has so far."""
  B, S = state.ids.shape
  at = jnp.arange(S)[None]
  real = (state.start[:, None] <= at) & (at < state.at)
  return jnp.zeros((B, vocabulary), bool).at[jnp.arange(B)[:, None], state.ids].max(real)


def repeated(config, cache, copies):
  """The cache with each row as often as `copies` says."""
  B = cache['valid'].shape[0]
  return by_rows(config, cache, jnp.repeat(jnp.arange(B), copies))


def by_rows(config, cache, rows):
  """The cache with these rows [C] of a batch, in this order."""
  B = cache['valid'].shape[0]

  def one(x, axis):                      # the axis has groups of rows, or the rows alone
    before, after = x.shape[:axis], x.shape[axis + 1:]
    x = x.reshape(*before, -1, B, *after)
    return jnp.take(x, rows, axis + 1, mode='clip').reshape(*before, -1, *after)
  return jax.tree.map(one, cache, batch_axes(config))


@functools.lru_cache
def batch_axes(config):
  """A tree like a cache, of the axes along which its arrays have the rows of a batch."""
  two, three = (jax.eval_shape(lambda B=B: empty_cache(config, B, 1, 1)) for B in (2, 3))
  differs = lambda a, b: next(k for k, (m, n) in enumerate(zip(a.shape, b.shape)) if m != n)
  return jax.tree.map(differs, two, three)
