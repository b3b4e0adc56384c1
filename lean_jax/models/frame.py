"""Where the tokens of a call stand, and the layers in their stack."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.nn.rope import rotation


class Frame(NamedTuple):
  """Where the tokens of a call stand; the same for all layers.

  Attributes:
    mask: [B T] bool, which tokens are real; None for all.
    known: [B S] bool, which places have a real token; None where all have and nothing is cached.
    visible: [B or 1, 1, T, S] bool, which keys a query may see, windows aside.
    distance: [T S], from key to query.
    cos, sin: [ropes B T R/2] of the tokens' positions; None without ropes.
    bias: None, or [B or 1, H, T, S], added to the scores of attention.
    offset: the place of the first of these tokens in the cache.
    cross: [B S D], an encoder's output; None without, or where the cache has its keys and values.
    cross_visible: [B or 1, 1, 1, S] bool, which of it is real.
    segments: [B T] integer, which of a row's texts each token is of; None for one text a row.
    prefix: None, or the `Prefix` that stands before every text.
    before: [B or 1, 1, T, P], from each of its keys to a query.
    before_bias: None, or [1 H T P], added to the scores of its keys.
  """
  mask: Any = None
  known: Any = None
  visible: Any = None
  distance: Any = None
  cos: Any = None
  sin: Any = None
  bias: Any = None
  offset: Any = 0
  cross: Any = None
  cross_visible: Any = None
  segments: Any = None
  prefix: Any = None
  before: Any = None
  before_bias: Any = None

  @property
  def plain(self):
    """Whether what a causal query sees follows from its place and segment alone."""
    alone = self.bias is None and self.prefix is None
    return alone and (self.mask is None or self.segments is not None)


class Place(NamedTuple):
  """What differs between layers of one kind: numbers, traced under nn.scan."""
  index: Any = None             # within the segment; None where it is not stacked
  window: Any = None
  rotary: Any = 0
  number: Any = 0               # within the stack


def check_segments(config, cache):
  """Raises InputError where rows cannot be of several texts."""
  stateful = sorted({l.mixer for l in config.each} - {'attention', 'latent'})
  if stateful:
    raise InputError(f'{" and ".join(stateful)} layers carry a state from one text of a row into '
                     'the next; give a text a row, padded')
  if cache is not None:
    raise InputError('segments with a cache; it is of one text a row: leave them out')


def framed(config, tokens, cache, offset, mask, segments=None, prefix=None):
  """The cache with these tokens noted, their Frame, and their positions [B or 1, T]."""
  B, T = tokens.shape
  if segments is not None:
    mask = segments > 0 if mask is None else mask & (segments > 0)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (B, T)).astype(bool)
  here = offset + jnp.arange(T)                                        # places of the queries
  if cache is None:
    known, S = mask, T
  else:
    S = cache['valid'].shape[1]
    new = jnp.ones((B, T), bool) if mask is None else mask
    known = jax.lax.dynamic_update_slice(cache['valid'], new, (0, offset))
    cache = dict(cache, valid=known)
  if mask is None and cache is None:
    at = here[None]
  else:
    new = jnp.ones((B, T), jnp.int32) if mask is None else mask.astype(jnp.int32)
    before = 0 if cache is None else jnp.sum(
        known & (jnp.arange(S) < offset)[None], axis=1, keepdims=True, dtype=jnp.int32)
    at = jnp.maximum(before + jnp.cumsum(new, axis=1) - 1, 0)          # [B T]
  distance = here[:, None] - jnp.arange(S)[None]                       # [T S]
  visible = jnp.broadcast_to(distance >= 0, (T, S)) if config.causal else jnp.ones((T, S), bool)
  visible = visible[None, None]
  if segments is not None:
    own = segments[:, :, None] == segments[:, None]                    # [B T T]
    visible = visible & own[:, None]
    at = jnp.maximum(at - jnp.min(jnp.where(own, at[:, None], T), axis=2), 0)
  elif known is not None:
    visible = visible & known[:, None, None, :]
  before = None
  if prefix is not None:
    P = prefix.length
    if config.positions and config.positions < P + T:
      raise InputError(f'{T} tokens after a prefix of {P} are more than the {config.positions} '
                       'positions; give fewer')
    at = at + P
    before = (at[:, :, None] - jnp.arange(P)[None, None])[:, None]
  cos = sin = None
  if config.attention.ropes:
    turned = [rotation(rope, at, rotated_width(config)) for rope in config.attention.ropes]
    cos, sin = (jnp.stack(part) for part in zip(*turned))
  frame = Frame(mask, known, visible, distance, cos, sin, offset=offset, segments=segments,
                prefix=prefix, before=before)
  return cache, frame, at


def crossed(cache, frame, cross, mask):
  """The cache and the Frame with an encoder's output [B S D], or with what the cache has of it."""
  if cross is None:
    mask = cache['source']
  else:
    B, S, _ = cross.shape
    mask = jnp.ones((B, S), bool) if mask is None else mask.astype(bool)
    if cache is not None:
      room = jnp.zeros_like(cache['source'])
      cache = dict(cache, source=jax.lax.dynamic_update_slice(room, mask, (0, 0)))
  return cache, frame._replace(cross=cross, cross_visible=mask[:, None, None, :])


def rotated_width(config):
  """The width that positions rotate: a head's, or MLA's rotary part."""
  return config.head_width if config.latent is None else config.latent.rope_width


def places(config, segment):
  """The Place of each layer of a segment: [count] numbers, [count period] for several kinds."""
  own = config.each[segment.first:segment.first + segment.count * len(segment.kinds)]
  if not segment.stacked:
    return Place(None, own[0].window, own[0].rotary, segment.first)
  fit = lambda v: jnp.asarray(v, jnp.int32).reshape(
      (segment.count,) if len(segment.kinds) == 1 else (segment.count, -1))
  windows = None
  if any(l.window is not None for l in own):
    windows = fit([2 ** 30 if l.window is None else l.window for l in own])
  rotary = fit([l.rotary for l in own])
  number = fit(range(segment.first, segment.first + len(own)))
  return Place(jnp.arange(segment.count), windows, rotary, number)
