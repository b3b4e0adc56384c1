"""A stack of layers from a config: what decoders, encoders and their pairs are made of.

A layer is a mixer (attention, a state space model, ...) and a feed-forward block. Layers of one
kind are stacked under nn.scan, so that one is compiled for all; a stack of several kinds is cut in
segments (see `segments`). With scan_layers=False each layer is written out.
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from lean_jax.errors import InputError
from lean_jax.kernels.platforms import device
from lean_jax.models.kinds import FEED_FORWARDS, MIXERS
from lean_jax.models.prefix import prefix_of
from lean_jax.models.segments import segments, uniform
from lean_jax.nn import attention
from lean_jax.nn.attention import AttentionOptions, CrossAttention
from lean_jax.nn.linear import Embedding, Linear
from lean_jax.nn.mlp import ACTIVATIONS, MLPOptions
from lean_jax.nn.norm import norm
from lean_jax.nn.pooling import Pooling
from lean_jax.nn.relative import RelativeBias, RelativeOptions
from lean_jax.nn.rope import rotation
from lean_jax.nn.rope_scaling import LongRope
from lean_jax.nn.rounded import Rounding
from lean_jax.nn.taps import STATES, TAPS

UNROLL = 4                    # layers in the scan's body on a CPU, where the loop costs a fifth


@dataclasses.dataclass(frozen=True)
class Layer:
  """What one layer is.

  Attributes:
    mixer: a name of `kinds.MIXERS`.
    feed_forward: a name of `kinds.FEED_FORWARDS`; None for none.
    window: how many keys on each side a query sees, its own included; None is all.
    rotary: which of the config's ropes its attention uses.
    mixer_norm: False leaves the mixer's input as it is where `norm_before` would normalise it.
  """
  mixer: str = 'attention'
  feed_forward: str | None = 'mlp'
  window: int | None = None
  rotary: int = 0
  mixer_norm: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
  """The hyper-parameters of a stack.

  Attributes:
    vocabulary: V, tokens.
    width: D, of the residual stream.
    layers: N.
    heads, groups: H query heads, G key and value heads; G divides H.
    head_width: K, of a head.
    hidden: F, of the feed-forward block.
    context: the longest sequence, in tokens.
    kinds: what each layer is; () is attention and MLP in all.
    attention, mlp: options of these blocks.
    moe, latent, mamba, mamba2, lstm: options of blocks that the kinds name; None where they name
      none.
    norm: 'rms' or 'layer'; epsilon, norm_offset, norm_bias and norm_scale are its own.
    norm_before, norm_after, norm_sum: whether a branch normalises its input, its output, and the
      sum with what it is added to.
    parallel: whether both branches see the layer's input; shared_norm: by one norm.
    final_norm: whether there is a norm after the last layer.
    embedding_scale: what embeddings are multiplied by.
    embedding_width: of the table; None is D, another is brought to D by a product.
    embedding_norm: whether embeddings are normalised.
    positions: rows of the table of learned positions, 0 for none; position_offset: of the first.
    token_types: rows of the table of token types (segments), 0 for none.
    relative: learned scores of distances, which all layers add to attention's; None for none.
    causal: whether a token sees only those before it.
    cross: whether each layer attends to an encoder's output too.
    pooling: how a text's vector is made of hidden states; None where nothing says.
    cache: how keys and values of a text are kept while it is written; None is as they are.
    dtype: of activations and products; parameters are float32.
    remat: whether the backward pass recomputes each layer: less memory, more time.
    scan_layers: whether layers of one kind are stacked.
  """
  vocabulary: int
  width: int
  layers: int
  heads: int = 1
  groups: int = 1
  head_width: int = 0
  hidden: int = 0
  context: int
  kinds: tuple[Layer, ...] = ()
  attention: AttentionOptions = AttentionOptions()
  mlp: MLPOptions = MLPOptions()
  moe: Any = None
  latent: Any = None
  mamba: Any = None
  mamba2: Any = None
  lstm: Any = None
  norm: str = 'rms'
  epsilon: float = 1e-5
  norm_offset: float = 0.
  norm_bias: bool = True
  norm_scale: bool = True
  norm_before: bool = True
  norm_after: bool = False
  norm_sum: bool = False
  parallel: bool = False
  shared_norm: bool = False
  final_norm: bool = True
  embedding_scale: float = 1.
  embedding_width: int | None = None
  embedding_norm: bool = False
  positions: int = 0
  position_offset: int = 0
  token_types: int = 0
  relative: RelativeOptions | None = None
  causal: bool = True
  cross: bool = False
  pooling: Pooling | None = None
  cache: Rounding | None = None
  dtype: str = 'float32'
  remat: bool = False
  scan_layers: bool = True

  @property
  def each(self):
    """The Layer of each layer."""
    return self.kinds or (Layer(),) * self.layers

  @property
  def stacks(self):
    """{where in the tree of parameters: the config of the stack there}."""
    return {'': self}

  @property
  def decoding(self):
    """The config of the stack that a cache is of."""
    return self

  @property
  def renewals(self):
    """Lengths past which all positions turn by other angles (LongRoPE): a cache is then stale."""
    scalings = [rope.scaling for rope in self.attention.ropes]
    return sorted({s.original for s in scalings if isinstance(s, LongRope)})


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


class Slot(struct.PyTreeNode):
  """A layer's part of the cache. Stacked arrays are updated in place, never sliced and rejoined."""
  arrays: dict
  index: Any = None

  def get(self, name):
    """This layer's array."""
    x = self.arrays[name]
    return x if self.index is None else jax.lax.dynamic_index_in_dim(x, self.index, 0, False)

  def length(self, name):
    """The length of axis 1 of this layer's array."""
    return self.arrays[name].shape[1 if self.index is None else 2]

  def part(self, name, start, size):
    """This layer's array, [:, start:start + size]."""
    x = self.arrays[name]
    lead = () if self.index is None else (self.index,)
    rest = x.ndim - len(lead) - 2
    at = (*lead, 0, start, *(0,) * rest)
    whole = x.shape[len(lead):]
    out = jax.lax.dynamic_slice(x, at, (1,) * len(lead) + (whole[0], size, *whole[2:]))
    return out.reshape(whole[0], size, *whole[2:])

  def set(self, name, value):
    """With this layer's array replaced."""
    return self._write(name, value, (0,) * value.ndim)

  def put(self, name, new, offset):
    """With `new` [B T ...] at `offset` of this layer's array's axis 1."""
    return self._write(name, new, (0, offset) + (0,) * (new.ndim - 2))

  def _write(self, name, new, at):
    old = self.arrays[name]
    new = new.astype(old.dtype)
    if self.index is not None:
      new, at = new[None], (self.index, *at)
    return self.replace(arrays={**self.arrays,
                                name: jax.lax.dynamic_update_slice(old, new, at)})


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


def empty_cache(config, batch, length, source=0):
  """Room for `length` tokens, and for the keys and values of `source` tokens of an encoder.

  Returns:
    dict: valid [B S], which places hold a real token; layers, the arrays of each segment; with
    cross attention source [B S], which of the encoder's tokens are real.
  """
  config = config.decoding
  def of(kind):
    shapes = MIXERS[kind[0]].state_shapes(config, batch, length)
    if config.cross:
      shapes |= attention.cross_state_shapes(config, batch, source)
    return shapes

  def made(segment):
    stacked = (segment.count,) if segment.stacked else ()
    each = {str(k): {n: jnp.zeros(stacked + shape, dtype) for n, (shape, dtype) in of(kind).items()}
            for k, kind in enumerate(segment.kinds)}
    return each if len(each) > 1 else each['0']

  cut = segments(config)
  layers = made(cut[0]) if uniform(cut) else {s.name: made(s) for s in cut}
  cache = dict(valid=jnp.zeros((batch, length), bool), layers=layers)
  return cache | dict(source=jnp.zeros((batch, source), bool)) if config.cross else cache


def _remat(config):
  return nn.remat(Block, prevent_cse=False) if config.remat else Block
