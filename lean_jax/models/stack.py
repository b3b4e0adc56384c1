"""A stack of layers from a config: what decoders, encoders and their pairs are made of.

A layer is a mixer (attention, a state space model, ...) and a feed-forward block. Layers of one
kind are stacked under nn.scan, so that one is compiled for all; a stack of several kinds is cut in
segments (see `segments`). With scan_layers=False each layer is written out.
"""
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.errors import InputError
from lean_jax.kernels.platforms import device
from lean_jax.models.cache import Slot, empty_cache
from lean_jax.models.config import StackConfig
from lean_jax.models.frame import Place, check_segments, crossed, framed, places
from lean_jax.models.kinds import FEED_FORWARDS, MIXERS
from lean_jax.models.prefix import prefix_of
from lean_jax.models.segments import segments, uniform
from lean_jax.nn.attention import CrossAttention
from lean_jax.nn.linear import Embedding, Linear
from lean_jax.nn.mlp import ACTIVATIONS
from lean_jax.nn.norm import norm
from lean_jax.nn.relative import RelativeBias
from lean_jax.nn.taps import STATES, TAPS

UNROLL = 4                    # layers in the scan's body on a CPU, where the loop costs a fifth


class Block(nn.Module):
  """One layer: x + mixer(norm(x)), then x + feed_forward(norm(x)), norms where the config says."""
  config: StackConfig
  mixer: str
  feed_forward: str | None
  mixer_norm: bool = True

  @nn.compact
  def __call__(self, carry, place, frame):
    """carry: x [B T D] and the arrays of the cache, None without; returns it, and None."""
    c, (x, arrays) = self.config, carry
    slot = None if arrays is None else Slot(arrays, place.index)
    x = nn.with_logical_constraint(x, ('batch', 'length', None))
    mixer = MIXERS[self.mixer].module(c, name=self.mixer)
    start = x
    normed = norm(c, 'mixer_norm')(x) if c.norm_before and self.mixer_norm else x
    y, slot = mixer(normed, frame, place, slot)
    x = self._add(x, self._adapted(normed, y, 'mixer'), 'mixer')
    if c.cross:
      h = norm(c, 'cross_norm')(x) if c.norm_before else x
      y, slot = CrossAttention(c, name='cross')(h, frame, slot)
      x = self._add(x, y, 'cross')
    if self.feed_forward is not None:
      if not (c.parallel and c.shared_norm):
        h = start if c.parallel else x
        normed = norm(c, 'feed_forward_norm')(h) if c.norm_before else h
      y = FEED_FORWARDS[self.feed_forward](c, name=self.feed_forward)(normed, frame)
      x = self._add(x, self._adapted(normed, y, 'feed_forward'), 'feed_forward')
    self.sow(STATES, 'hidden', x)
    return (x, None if slot is None else slot.arrays), None

  def _adapted(self, x, y, branch):
    """A branch's result y of its input x, with its bottleneck if there is one."""
    name = f'{branch}_adapter'
    if not self.has_variable('params', name):
      return y
    w = self.get_variable('params', name)
    return w.after(x, y, ACTIVATIONS[w.activation])

  def _add(self, x, y, branch):
    c = self.config
    if c.norm_after:
      y = norm(c, f'{branch}_norm_after')(y)
    x = x + y
    return norm(c, f'{branch}_norm_sum')(x) if c.norm_sum else x


class Period(nn.Module):
  """Several layers that repeat together, one after the other."""
  config: StackConfig
  kinds: tuple[tuple[str, str | None, bool], ...]

  @nn.compact
  def __call__(self, carry, place, frame):
    x, arrays = carry
    out = {}
    block = _remat(self.config)
    for k, kind in enumerate(self.kinds):
      own = None if arrays is None else arrays[str(k)]
      here = Place(place.index, *(None if v is None else v[k] for v in place[1:]))
      (x, out[str(k)]), _ = block(self.config, *kind, name=str(k))((x, own), here, frame)
    return (x, None if arrays is None else out), None


class Segments(nn.Module):
  """A stack of several kinds of layers: its segments by name, one after the other."""
  config: StackConfig

  @nn.compact
  def __call__(self, x, frame, arrays):
    out = {}
    for s in segments(self.config):
      module = segment_module(self.config, s, self.is_initializing(), name=s.name)
      own = None if arrays is None else arrays[s.name]
      x, out[s.name] = run_segment(module, self.config, s, x, frame, own)
    return x, None if arrays is None else out


def segment_module(config, segment, initializing, **kw):
  """The module of a segment, scanned if it is stacked."""
  kinds = segment.kinds
  if not segment.stacked:
    return _remat(config)(config, *kinds[0], **kw)
  cls, args = (_remat(config), kinds[0]) if len(kinds) == 1 else (Period, (kinds,))
  scanned = nn.scan(
      cls, variable_axes=dict.fromkeys(('params', 'losses', *TAPS), 0),
      split_rngs={'params': True}, in_axes=(0, nn.broadcast), length=segment.count,
      unroll=1 if initializing or device.platform() != 'cpu' else max(
          1, min(segment.count, UNROLL // len(kinds))),
      metadata_params={nn.PARTITION_NAME: 'layers'})
  return scanned(config, *args, **kw)


def run_segment(module, config, segment, x, frame, arrays):
  """x [B T D] and the segment's part of the cache, after its layers."""
  (x, arrays), _ = module((x, arrays), places(config, segment), frame)
  return x, arrays


class Stack(nn.Module):
  """Embeddings, layers and the last norm: tokens in, hidden states out."""
  config: StackConfig
  shared: Any = None            # the Embedding of another stack; None makes one

  def setup(self):
    c = self.config
    self.embed = self.shared or Embedding(c.vocabulary, c.embedding_width or c.width, c.dtype)
    if c.positions:
      self.positions = Embedding(c.positions, c.width, c.dtype)
    if c.token_types:
      self.token_types = Embedding(c.token_types, c.width, c.dtype)
    if c.embedding_norm:
      self.embed_norm = norm(c)
    if c.embedding_width not in (None, c.width):
      self.embed_in = Linear('btd,df->btf', (c.embedding_width, c.width), (None, 'embed'), c.dtype)
    if c.relative:
      self.relative = RelativeBias(c)
    self.layers = layer_stack(c, self.is_initializing())
    if c.final_norm:
      self.norm = norm(c)

  def hidden(self, tokens, cache=None, offset=0, mask=None, token_types=None, cross=None,
             cross_mask=None, segments=None):
    """The last layer's output after the final norm, [B T D], and the cache.

    Args:
      tokens: [B T], integer.
      cache: None, or what `empty_cache` or an earlier call gave.
      offset: how many tokens the cache holds; scalar.
      mask: [B T] bool, which tokens are real; None for all. Positions count real tokens.
      token_types: [B T]; None is type 0.
      cross: [B S D], the encoder's output that layers attend to; None where the cache has it.
      cross_mask: [B S] bool, which of it is real; None for all.
      segments: [B T], integer: which of several texts in a row a token is of, 0 where of none. A
        token sees its own text alone, whose positions begin anew. None is one text a row.

    Raises:
      InputError: segments with a cache, or in a model whose state goes on from text to text.
    """
    x, frame, cache = self.begin(tokens, cache, offset, mask, token_types, cross, cross_mask,
                                 segments)
    return self.through(x, frame, cache)

  def begin(self, tokens, cache=None, offset=0, mask=None, token_types=None, cross=None,
            cross_mask=None, segments=None):
    """What the layers are given: embeddings [B T D], the Frame and the cache; as `hidden` takes.
    """
    if segments is not None:
      check_segments(self.config, cache)
    prefix = None if self.is_initializing() else prefix_of(self, self.variables.get('params', {}))
    cache, frame, at = framed(self.config, tokens, cache, offset, mask, segments, prefix)
    if self.config.cross:
      cache, frame = crossed(cache, frame, cross, cross_mask)
    return self.embedded(tokens, at, token_types), self.biased(frame), cache

  def biased(self, frame):
    """The Frame with the scores of distances, if layers add any."""
    if not self.config.relative:
      return frame
    frame = frame._replace(bias=self.relative(frame.distance))
    if frame.prefix is None:
      return frame
    P = frame.prefix.length                            # distance[:, 0] is a query's own place
    return frame._replace(before_bias=self.relative(
        frame.distance[:, :1] + P - jnp.arange(P)[None]))

  def prompted(self, prompt, tokens, mask=None):
    """`hidden`'s output [B P+T D] of a soft prompt and the tokens [B T] after it, which see each
    other.

    Raises:
      InputError: there are fewer positions than that.
    """
    c, (B, T), P = self.config, tokens.shape, prompt.length
    if c.positions and c.positions - c.position_offset < P + T:
      raise InputError(f'{T} tokens after a prompt of {P} are more than the '
                       f'{c.positions - c.position_offset} positions; give fewer')
    if mask is not None:
      mask = jnp.pad(mask.astype(bool), ((0, 0), (P, 0)), constant_values=True)
    _, frame, at = framed(c, jnp.pad(tokens, ((0, 0), (P, 0))), None, 0, mask)
    x = self.scaled(tokens)
    x = jnp.concatenate([jnp.broadcast_to(prompt.value[None], (B, *prompt.value.shape)).astype(
        x.dtype), x], axis=1)
    return self.through(self.placed(x, at), self.biased(frame), None)[0]

  def cache_of(self, x):
    """What layers keep of a text by itself, as `empty_cache` has it; x [T D], its embeddings."""
    T, x = len(x), x.astype(self.config.dtype)
    cache, frame, at = framed(self.config, jnp.zeros((1, T), jnp.int32),
                              empty_cache(self.config, 1, T), 0, None)
    return self.through(self.placed(x[None], at), frame, cache)[1]['layers']

  def embedded(self, tokens, at, token_types=None):
    """Embeddings [B T D] of tokens [B T] at positions `at` [B or 1, T]."""
    return self.placed(self.scaled(tokens), at, token_types)

  def scaled(self, tokens):
    """The rows of the table of tokens [B T], scaled."""
    x, scale = self.embed(tokens), self.config.embedding_scale
    return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

  def placed(self, x, at, token_types=None):
    """What `embedded` makes of rows x of the table, scaled."""
    c = self.config
    if c.embedding_width not in (None, c.width):
      x = self.embed_in(x)
    if c.positions:
      x = x + self.positions(at + c.position_offset)
    if c.token_types:
      types = jnp.zeros((1, 1), jnp.int32) if token_types is None else token_types
      x = x + self.token_types(types)
    if c.embedding_norm:
      x = self.embed_norm(x)
    self.sow(STATES, 'embedding', x)
    return nn.with_logical_constraint(x, ('batch', 'length', None))

  def through(self, x, frame, cache):
    """What `hidden` returns, of embeddings [B T D]."""
    c = self.config
    arrays = None if cache is None else cache['layers']
    cut = segments(c)
    if uniform(cut):
      x, arrays = run_segment(self.layers, c, cut[0], x, frame, arrays)
    else:
      x, arrays = self.layers(x, frame, arrays)
    return self.end(x), None if cache is None else dict(cache, layers=arrays)

  def end(self, x):
    """What `hidden` makes of the last layer's output [B T D]."""
    return self.norm(x) if self.config.final_norm else x


def layer_stack(config, initializing):
  """The module of all layers: scanned if they are of one kind."""
  cut = segments(config)
  return segment_module(config, cut[0], initializing) if uniform(cut) else Segments(config)


def _remat(config):
  return nn.remat(Block, prevent_cse=False) if config.remat else Block
