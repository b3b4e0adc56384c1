"""The two compiled programs of generation: the prompt's forward pass, and the loop after it.

Both hold ids [B S], the prompts and what follows, and a cache of S tokens; S and the prompt's
padded length are powers of two, so that few programs serve all lengths. Padding stands after the
prompt and is masked: it changes no state of a recurrent layer, a causal mask hides it from the
prompt's tokens, and the loop overwrites each place before a token sees it. So results do not depend
on it.
"""
import functools

import jax
import jax.numpy as jnp

from lean_jax.generation.sampling import sample
from lean_jax.models.decoder import empty_cache

_LEAST = 16                   # tokens; shorter programs differ too little to compile one for each


def bucket(length, context):
  """The padded length: the next power of two, the context at most."""
  return min(context, max(_LEAST, 1 << (length - 1).bit_length()))


@functools.partial(jax.jit, static_argnames=('module', 'padded', 'top_k'))
def prefill(module, params, ids, length, key, temperature, top_p, *, padded, top_k, source=None,
            source_length=None):
  """Runs the prompts and puts the first token after them.

  Args:
    module: a decoder, or an encoder and a decoder.
    params: its parameters.
    ids: [B S], of which [:, :length] are prompts.
    length: 1 to padded.
    key, temperature, top_p, top_k: as `sample` takes them.
    padded: how much of ids is run.
    source: [B R], of which [:, :source_length] are what the encoder reads; None without one.

  Returns:
    ids with a token at [:, length], and the cache of S tokens.
  """
  B, S = ids.shape
  real = lambda n, of: jnp.broadcast_to(jnp.arange(n)[None] < of, (B, n))
  R = 0 if source is None else source.shape[1]
  cache = empty_cache(module.config, B, S, R)
  read = () if source is None else (source, real(R, source_length))
  logits, cache = module.apply({'params': params}, ids[:, :padded], cache, 0, length - 1,
                               real(padded, length), *read, method=logits_at)
  token = sample(logits, fold(key, length), temperature, top_p, top_k)
  return put(ids, token, length), cache


@functools.partial(jax.jit, static_argnames=('module', 'top_k'), donate_argnames=('ids', 'cache'))
def decode(module, params, ids, cache, at, end, key, temperature, top_p, eos, *, top_k):
  """Puts tokens at [:, at:end], one at a time, until each row has an end token.

  Args:
    module: a decoder.
    params: its parameters.
    ids, cache: from `prefill`; not usable afterwards.
    at: where the first new token goes; the token before it is not yet in the cache.
    end: S at most.
    key, temperature, top_p, top_k: as `sample` takes them.
    eos: [E], tokens that end a row, which is then filled with the one it had; E may be 0.

  Returns:
    ids, where the last token went plus one, and the cache.
  """
  def last(ids, at):
    return jax.lax.dynamic_slice_in_dim(ids, at - 1, 1, axis=1)             # [B 1]

  def ended(token):
    return jnp.any(token == eos[None, :], axis=-1)                          # [B]

  def going(state):
    ids, _, at = state
    return (at < end) & ~jnp.all(ended(last(ids, at)))

  def step(state):
    ids, cache, at = state
    previous = last(ids, at)
    logits, cache = module.apply({'params': params}, previous, cache, at - 1, 0, method=logits_at)
    token = sample(logits, fold(key, at), temperature, top_p, top_k)
    token = jnp.where(ended(previous), previous[:, 0], token)
    return put(ids, token, at), cache, at + 1

  ids, cache, at = jax.lax.while_loop(going, step, (ids, cache, at))
  return ids, at, cache


def logits_at(module, tokens, cache, offset, row, mask=None, source=None, source_mask=None):
  """Logits [B V] after `tokens[:, row]`, and the cache: no other position pays for the head."""
  read = () if source is None else (module.encode(source, source_mask), source_mask)
  x, cache = module.hidden(tokens, cache, offset, mask, *read)
  return module.logits(jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1))[:, 0], cache


def put(ids, token, at):
  """Ids [B S] with token [B] at [:, at]."""
  token = token[:, None].astype(ids.dtype)
  return jax.lax.dynamic_update_slice_in_dim(ids, token, at, axis=1)


def fold(key, at):
  """The key of one position; None stays None."""
  return None if key is None else jax.random.fold_in(key, at)
