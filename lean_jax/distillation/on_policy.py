"""Distillation on what the student itself writes.

On a part of the steps the student completes the batch's prompts, and the losses compare it with its
teachers on these completions: Agarwal et al. 2023 (GKD, arXiv:2306.13649), algorithm 1, whose
lambda is `fraction`. Nothing is differentiated through the sampling (section 3.2 there).
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation.loop import State, among, decode, prefill
from lean_jax.generation.sampling import checked

_OWN = 2 ** 31                # folded into a step's key: the keys of its loss are not used again


def rollout(module, *, tokens, fraction=.5, temperature=1., ends=(), seed=0):
  """What `training.loop.fit` takes as `rollout`: on some steps, a batch that the student wrote.

  Which steps these are follows from the seed and the step, so that a resumed run samples what an
  uninterrupted one does.

  Args:
    module: the student: a decoder, or an encoder and a decoder.
    tokens: that it writes at most.
    fraction: of the steps; 0 to 1.
    temperature: of the sampling; 0 takes the most probable tokens.
    ends: tokens that end a text; what would follow them does not count.
    seed: of the choice of steps.

  Returns:
    (params, batch, key, step) -> the batch, or that of `completed`.

  Raises:
    InputError: a number out of range, or a position encoding that a cache of these cannot have.
  """
  number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
  if not number(fraction) or not 0 <= fraction <= 1:
    raise InputError(f'fraction {fraction!r} of on_policy; give 0 to 1, of the steps')
  if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
    raise InputError(f'tokens {tokens!r} of on_policy; give 1 or more, that the student writes')
  if not number(temperature):
    raise InputError(f'temperature {temperature!r} of on_policy; give a number, 1. say')
  checked(temperature)
  if module.config.decoding.renewals:
    raise InputError('positions of this student turn by other angles past '
                     f'{module.config.decoding.renewals[0]} tokens (longrope), which on_policy '
                     'does not follow; leave it out')
  ends = np.asarray(ends, np.int32).reshape(-1)

  def of_step(params, batch, key, step):
    if np.random.default_rng((seed, step)).random() >= fraction:
      return batch
    key = jax.random.fold_in(jax.random.fold_in(key, step), _OWN)
    return completed(module, params, batch, key, ends, tokens=tokens, temperature=temperature)
  return of_step


@functools.partial(jax.jit, static_argnames=('module', 'tokens', 'temperature'))
def completed(module, params, batch, key, ends, *, tokens, temperature):
  """The batch's prompts and what a model writes after them.

  A prompt is what stands before a row's first label, or of plain text [B T] all but the last
  `tokens`; of one that is longer, its end. Of an encoder and a decoder it is the source, and
  targets are written anew.

  Args:
    ends: [E], tokens that end a text.
    tokens, temperature: as in `rollout`.

  Returns:
    A batch: `tokens` and `mask` [B T], or the `decoder_` ones; `labels` [B T], the token after each
    of those that were written, the end included, -1 elsewhere; and `sampled` [B], all True.
  """
  if 'decoder_tokens' in module.inputs:
    ids, start, given = _targets_begun(module.config, batch, tokens)
    first, side = ids.shape[1] - tokens, 'decoder_'
  else:
    ids, start = _prompts(batch, tokens)
    first, side, given = ids.shape[1] - tokens, '', ()
  B, T = ids.shape
  sampling = checked(temperature)
  keys = None if temperature == 0 else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
  state = State(ids, start, jnp.int32(first), jnp.int32(first), jnp.zeros((B,), bool), keys)
  state = prefill(module, params, state, sampling, ends, *given, padded=first)
  ids = jax.lax.stop_gradient(decode(module, params, state, T, sampling, ends).ids)
  at = jnp.arange(T)[None]
  ended = jnp.cumsum(among(ids, ends) & (at >= first), axis=1)
  over = jnp.pad(ended[:, :-1], ((0, 0), (1, 0))) > 0              # an end stands before it
  real = (at >= start[:, None]) & ~over
  counts = jnp.roll(real, -1, axis=1) & (at >= first - 1) & (at < T - 1)
  source = {k: batch[k] for k in ('tokens', 'mask') if side and k in batch}
  return source | {f'{side}tokens': ids, f'{side}mask': real,
                   'labels': jnp.where(counts, jnp.roll(ids, -1, axis=1), -1),
                   'sampled': jnp.ones((B,), bool)}


def _prompts(batch, room):
  """ids [B T] with each row's prompt up to place T - room, and where it starts, [B]."""
  tokens, labels = batch['tokens'], batch.get('labels')
  B, T = tokens.shape
  P = T - room
  if P < 1:
    raise InputError(f'{room} tokens of on_policy leave no prompt in rows of {T}; give 1 to '
                     f'{T - 1}, or a longer window')
  length = jnp.full((B,), P, jnp.int32)
  if 'mask' in batch:
    length = jnp.minimum(length, jnp.sum(batch['mask'], axis=1, dtype=jnp.int32))
  if labels is not None:
    if labels.ndim != 2:
      raise InputError('on_policy completes texts, and these labels are of whole rows; leave it '
                       'out')
    has = jnp.any(labels >= 0, axis=1)
    length = jnp.where(has, jnp.argmax(labels >= 0, axis=1) + 1, length)
  from_ = length[:, None] - P + jnp.arange(P)[None]                # [B P], negative before a row
  ids = jnp.take_along_axis(tokens, jnp.maximum(from_, 0), axis=1)
  ids = jnp.where(from_ >= 0, ids, 0).astype(jnp.int32)
  return jnp.pad(ids, ((0, 0), (0, room))), jnp.maximum(P - length, 0)


def _targets_begun(c, batch, room):
  """ids [B P + room] with what a target begins with, their start, and what the encoder reads."""
  B, S = batch['tokens'].shape
  begin = jnp.asarray([c.start] if c.first is None else [c.start, c.first], jnp.int32)
  if len(begin) + room > c.context:
    raise InputError(f'{room} tokens of on_policy; a target has at most {c.context - len(begin)}')
  ids = jnp.broadcast_to(jnp.pad(begin, (0, room))[None], (B, len(begin) + room))
  lengths = (jnp.sum(batch['mask'], axis=1, dtype=jnp.int32) if 'mask' in batch
             else jnp.full((B,), S, jnp.int32))
  return ids, jnp.zeros((B,), jnp.int32), (batch['tokens'], lengths)
