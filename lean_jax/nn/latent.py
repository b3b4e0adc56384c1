"""Multi-head latent attention: keys and values are made from one short vector a token.

DeepSeek-AI 2024 (arXiv:2405.04434), section 2.1. The cache holds that vector and the rotary part of
the keys, which all heads share.
"""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.attention import attend, grouped, tap_attention, within
from lean_jax.nn.causal import causal_attention
from lean_jax.nn.linear import Linear, weight
from lean_jax.nn.norm import RMSNorm
from lean_jax.nn.rope import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentOptions:
  """The shapes of latent attention; its ropes are those of the config's attention.

  Attributes:
    query_rank: None, or the width of the short vector that queries are made from.
    rank: R, of the short vector that keys and values are made from.
    plain_width, rope_width: of a head's queries and keys, the part without positions and the one
      with them.
    value_width: of a head's values.
    scale: of the scores; None is 1 / sqrt(plain_width + rope_width).
    bias: whether the products of the layer's input, and the last one, have biases.
    epsilon: of the norms of the short vectors.
  """
  query_rank: int | None
  rank: int
  plain_width: int
  rope_width: int
  value_width: int
  scale: float | None = None
  bias: bool = False
  epsilon: float = 1e-6


class LatentAttention(nn.Module):
  """softmax(q k) v, where keys and values are products of a latent vector: k = c K, v = c V.

  Few queries, as in decoding, never make the keys and values: q (c K)^T is (q K^T) c^T (section
  2.1.2). There K and V count as dense, also where their kind of weight rounds activations.
  """
  config: Any
  reads = ('q', 'q_a', 'kv_a')
  writes = ('o',)

  @nn.compact
  def __call__(self, x, frame, layer, slot):
    """Attends to what `frame` and `layer` let it; latents and rotary keys go through `slot`."""
    B, T, D = x.shape
    c, o = self.config, self.config.latent
    cos, sin = frame.cos[layer.rotary], frame.sin[layer.rotary]              # [B T P/2]
    turn = lambda h: rotate(h, cos, sin, c.attention.ropes[0].interleaved)
    q = self._queries(x)
    q, turned = q[..., :o.plain_width], turn(q[..., o.plain_width:])
    joint = self._product('kv_a', x, o.rank + o.rope_width, bias=o.bias)
    latent = RMSNorm(o.epsilon, c.dtype, name='kv_a_norm')(joint[..., :o.rank])       # [B T R]
    key = turn(joint[:, :, None, o.rank:])                                   # [B T 1 P]
    if slot is not None:
      slot = slot.put('latent', latent, frame.offset).put('key', key[:, :, 0], frame.offset)
      latent, key = slot.get('latent').astype(c.dtype), slot.get('key').astype(c.dtype)[:, :, None]
    k_b, v_b = (Matrix((o.rank, c.heads * n), name=name)()
                for name, n in (('k_b', o.plain_width), ('v_b', o.value_width)))
    split = lambda h: h.reshape(*h.shape[:2], c.heads, -1)
    if slot is not None and few(T, o):
      per_head = lambda w: w.unbox().reshape(o.rank, c.heads, -1).astype(c.dtype)
      q = jnp.einsum('bthp,rhp->bthr', q, per_head(k_b))
      y = self._attend(q, turned, latent[:, :, None], key, latent[:, :, None], frame, layer, slot)
      y = jnp.einsum('bthr,rhv->bthv', y, per_head(v_b))
    else:
      k, v = (split(w.einsum('btr,rf->btf', latent)) for w in (k_b, v_b))
      y = self._attend(q, turned, k, key, v, frame, layer, slot)
    y = nn.with_logical_constraint(y.reshape(B, T, -1), ('batch', 'length', 'heads'))
    return Linear('btf,fd->btd', (c.heads * o.value_width, D), ('heads', 'embed'), c.dtype, o.bias,
                  name='o')(y), slot

  def _queries(self, x):
    """[B T H plain_width + rope_width]."""
    c, o = self.config, self.config.latent
    width = c.heads * (o.plain_width + o.rope_width)
    if o.query_rank is None:
      q = self._product('q', x, width, 'heads')
    else:
      low = self._product('q_a', x, o.query_rank, bias=o.bias)
      low = RMSNorm(o.epsilon, c.dtype, name='q_a_norm')(low)
      q = self._product('q_b', low, width, 'heads', first=None)
    return q.reshape(*x.shape[:2], c.heads, -1)

  def _product(self, name, x, width, axis=None, *, first='embed', bias=False):
    return Linear('btd,df->btf', (x.shape[-1], width), (first, axis), self.config.dtype, bias,
                  name=name)(x)

  def _attend(self, q, turned, k, key, v, frame, layer, slot):
    """[B T H W] of queries and keys in two parts, the plain one and the rotated one."""
    c, o = self.config, self.config.latent
    scale = (o.plain_width + o.rope_width) ** -.5 if o.scale is None else o.scale
    q = jnp.concatenate([q, turned], axis=-1)
    k = jnp.concatenate([k, jnp.broadcast_to(key, (*k.shape[:3], o.rope_width))], axis=-1)
    visible = within(frame.visible, frame.distance, layer.window)
    if slot is None:
      tap_attention(self, q, k, v, visible, scale=scale, bias=frame.bias)
    if frame.plain and c.causal and slot is None and layer.window is None:
      return causal_attention(q, k, v, scale, frame.segments)
    return attend(q, grouped(k), grouped(v), visible, scale=scale, bias=frame.bias)


class Matrix(nn.Module):
  """A weight by itself, from latent vectors to heads; called, it is given."""
  shape: tuple[int, int]

  @nn.compact
  def __call__(self):
    return weight(self, 'kernel', 'io', self.shape, (None, 'heads'))


def few(queries, options):
  """Whether attending on the latents costs less than to make keys and values of each.

  For each cached token and head: products of R with both widths, then of each query with them; or
  of each query with R twice.
  """
  both = options.plain_width + options.value_width
  return queries * (2 * options.rank - both) < options.rank * both


def state_shapes(config, batch, length):
  """{name: (shape, dtype)} of a layer's latents and rotary keys of `length` tokens."""
  return dict(latent=((batch, length, config.latent.rank), config.dtype),
              key=((batch, length, config.latent.rope_width), config.dtype))
