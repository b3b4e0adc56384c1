"""Attention with grouped keys and values, to the tokens themselves or to an encoder's."""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn import rounded
from lean_jax.nn.causal import causal_attention
from lean_jax.nn.linear import Linear
from lean_jax.nn.norm import norm
from lean_jax.nn.rope import Rope, rotate
from lean_jax.nn.taps import HEADS, SCORES, asked

HIDDEN = float(jnp.finfo(jnp.float32).min)     # the score of a key that a query does not see


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
  """What attention computes beside softmax(q k / sqrt(K)) v.

  Attributes:
    ropes: rotary positions; a layer's `rotary` says which of them it uses. () for none.
    bias: whether the products for queries, keys and values have biases.
    out_bias: whether the last product has one.
    norm: of queries and keys, as the stack's are: None, each 'head' by itself (arXiv:2302.05442),
      or the 'whole' width at once.
    scale: of the scores; None is 1 / sqrt(K).
    scale_by_depth: whether the scores of layer n, the first being 1, are divided by n.
    softcap: scores become softcap * tanh(scores / softcap); None leaves them (arXiv:2408.00118).
    sinks: whether each head has a learned score of attending to nothing (arXiv:2309.17453).
  """
  ropes: tuple[Rope, ...] = (Rope(),)
  bias: bool = False
  out_bias: bool = False
  norm: str | None = None
  scale: float | None = None
  scale_by_depth: bool = False
  softcap: float | None = None
  sinks: bool = False


class Attention(nn.Module):
  """Multi-head attention, the key and value heads shared by groups (arXiv:2305.13245)."""
  config: Any
  reads = ('q', 'k', 'v')       # the weights that multiply x itself
  writes = ('o',)               # and those whose products are the result

  @nn.compact
  def __call__(self, x, frame, layer, slot):
    """Attends to what `frame` and `layer` let it; keys and values go through `slot`."""
    B, T, D = x.shape
    c, o = self.config, self.config.attention
    q = self._heads('q', x, c.heads)
    k, v = self._heads('k', x, c.groups), self._heads('v', x, c.groups, normed=False)
    if o.ropes:
      cos, sin = frame.cos[layer.rotary], frame.sin[layer.rotary]              # [B T R/2]
      turn = lambda h: rotate(h, cos, sin, o.ropes[0].interleaved)
      q, k = turn(q), turn(k)
    scale = c.head_width ** -.5 if o.scale is None else o.scale
    if o.scale_by_depth:
      scale = scale / (layer.number + 1)
    visible = within(frame.visible, frame.distance, layer.window)
    if slot is None:
      tap_attention(self, q, k, v, visible, scale=scale, softcap=o.softcap, bias=frame.bias)
    sinks = self.param('sinks', nn.initializers.zeros, (c.heads,)) if o.sinks else None
    whole = (frame.plain and c.causal and slot is None and layer.window is None
             and o.softcap is None and sinks is None)
    if whole:
      y = causal_attention(q, k, v, scale, frame.segments)
    else:
      held = Plain(grouped(k), grouped(v))
      if slot is not None and c.cache is not None:
        slot, held = rounded.held(slot, *held, frame, c)
      elif slot is not None:
        slot = slot.put('k', held.k, frame.offset).put('v', held.v, frame.offset)
        held = Plain(slot.get('k').astype(c.dtype), slot.get('v').astype(c.dtype))
      how = dict(scale=scale, softcap=o.softcap, sinks=sinks)
      if frame.prefix is not None:
        how['prefix'] = before(frame, layer, B, c.dtype)
      if (T == 1 and isinstance(held, rounded.Held) and frame.bias is None
          and frame.prefix is None):
        y = held.attended(q, visible, **how)
      else:
        y = attend_to(q, held, visible, bias=frame.bias, **how)
    y = nn.with_logical_constraint(y.reshape(B, T, -1), ('batch', 'length', 'heads'))
    y = Linear('btf,fd->btd', (c.heads * c.head_width, D), ('heads', 'embed'), c.dtype,
               o.out_bias, name='o')(y)
    return y, slot

  def _heads(self, name, x, n, normed=True):
    """[B T n K] of x [B T D]."""
    c, o = self.config, self.config.attention
    B, T, D = x.shape
    h = Linear('btd,df->btf', (D, n * c.head_width), ('embed', 'heads'), c.dtype, o.bias,
               name=name)(x)
    if normed and o.norm == 'whole':
      h = norm(c, f'{name}_norm')(h)
    h = h.reshape(B, T, n, c.head_width)
    return norm(c, f'{name}_norm')(h) if normed and o.norm == 'head' else h


class CrossAttention(nn.Module):
  """Attention to an encoder's output, `frame.cross`; its keys and values are made once."""
  config: Any

  @nn.compact
  def __call__(self, x, frame, slot):
    """x [B T D]; gives [B T D] and the slot."""
    B, T, D = x.shape
    c, o = self.config, self.config.attention
    into = lambda name, h, n: Linear(
        'btd,df->btf', (h.shape[-1], n * c.head_width), ('embed', 'heads'), c.dtype, o.bias,
        name=name)(h).reshape(B, h.shape[1], n, c.head_width)
    q = into('q', x, c.heads)
    if frame.cross is not None:
      k, v = (grouped(into(name, frame.cross, c.groups)) for name in 'kv')
      if slot is not None:
        slot = slot.set('cross_k', k).set('cross_v', v)
    else:
      k, v = slot.get('cross_k').astype(c.dtype), slot.get('cross_v').astype(c.dtype)
    scale = c.head_width ** -.5 if o.scale is None else o.scale
    y = attend(q, k, v, frame.cross_visible, scale=scale).reshape(B, T, -1)
    y = nn.with_logical_constraint(y, ('batch', 'length', 'heads'))
    return Linear('btf,fd->btd', (c.heads * c.head_width, D), ('heads', 'embed'), c.dtype,
                  o.out_bias, name='o')(y), slot


def within(visible, distance, window):
  """Which keys a query sees, [B or 1, 1, T, S], of those `visible` by their distance [T S]."""
  if window is None:
    return visible
  return visible & (jnp.abs(distance) < window)[None, None]


def tap_attention(module, q, k, v, visible, **how):
  """Shows queries, keys and values as they are multiplied, and scores, to a call that asks.

  Args:
    module: whose taps they are.
    q, k, v: [B T H K], [B T G K], [B T G W]; positions are in q and k.
    visible, **how: as `scores_of` takes them. A score that is not visible is `HIDDEN`.
  """
  if asked(module, HEADS):
    for name, x in dict(queries=q, keys=k, values=v).items():
      module.sow(HEADS, name, x)
  if asked(module, SCORES):
    B, T, H, _ = q.shape
    scores = scores_of(q, Plain(grouped(k), None), visible, **how)          # [G B R T S]
    module.sow(SCORES, 'scores', scores.transpose(1, 0, 2, 3, 4).reshape(B, H, T, -1))


def state_shapes(config, batch, length):
  """{name: (shape, dtype)} of a layer's keys and values of `length` tokens, as `grouped` has them.
  """
  if config.cache is not None:
    return rounded.state_shapes(config, batch, length)
  shape = (config.groups * batch, length, config.head_width)
  return dict(k=(shape, config.dtype), v=(shape, config.dtype))


def cross_state_shapes(config, batch, source):
  """The same of the keys and values of an encoder's `source` tokens."""
  shape = (config.groups * batch, source, config.head_width)
  return dict(cross_k=(shape, config.dtype), cross_v=(shape, config.dtype))


def grouped(x):
  """Keys or values [B S G K], each group's tokens together: [G*B S K].

  A product of each with its queries reads them as they are. Of any other layout, XLA:CPU makes a
  copy for every token that is generated; of this one where G * B is 1, whose product it makes one
  of matrices.
  """
  B, S, G, K = x.shape
  return x.transpose(2, 0, 1, 3).reshape(G * B, S, K)


def attend(q, k, v, visible, **how):
  """`attend_to` keys [G*B S K] and values [G*B S W], as `grouped` gives them, G dividing H."""
  return attend_to(q, Plain(k, v), visible, **how)


class Plain(NamedTuple):
  """Keys [G*B S K] and values [G*B S W] as arrays."""
  k: Any
  v: Any

  def scores(self, q):
    """Products of queries [G*B R*T K] with all keys, [G*B R*T S] float32."""
    return jax.lax.dot_general(q, self.k, (((2,), (2,)), ((0,), (0,))),
                               preferred_element_type=jnp.float32)

  def mixed(self, probs):
    """Values weighted by probs [G*B R*T S]: [G*B R*T W]."""
    return jax.lax.dot_general(probs, self.v, (((2,), (1,)), ((0,), (0,))))


def before(frame, layer, B, dtype):
  """A layer's keys and values that stand before each of B texts, which queries see which, and what
  is added to their scores.
  """
  rows = lambda x: grouped(
      jnp.broadcast_to(x[layer.number][None], (B, *x.shape[1:])).astype(dtype))
  visible = jnp.ones(frame.before.shape, bool)
  if layer.window is not None:
    visible = frame.before < layer.window
  return Plain(rows(frame.prefix.k), rows(frame.prefix.v)), visible, frame.before_bias


def attend_to(q, held, visible, *, scale=None, softcap=None, sinks=None, bias=None, prefix=None):
  """softmax(scale q k) v where `visible` lets it, the softmax in float32.

  Args:
    q: [B T H K].
    held: keys and values: `Plain`, or `rounded.Held`.
    visible: [B or 1, 1, T or 1, S], bool. A query that sees nothing gets the mean of all.
    scale: None is 1 / sqrt(K).
    softcap: None, or the bound that tanh puts on the scores.
    sinks: None, or [H]: the score of attending to nothing.
    bias: None, or [B or 1, H, T, S], added to the scores.
    prefix: None, or more keys and values, `Plain`, which are visible, [B or 1, 1, T, P], and their
      bias, or None.

  Returns:
    [B T H W], in q's dtype.
  """
  B, T, H, _ = q.shape
  scores = scores_of(q, held, visible, scale=scale, softcap=softcap, bias=bias)
  G, _, R, _, S = scores.shape
  parts = [scores]
  if prefix is not None:
    parts.append(scores_of(q, *prefix[:2], scale=scale, softcap=softcap, bias=prefix[2]))
  if sinks is not None:
    parts.append(jnp.broadcast_to(sinks.astype(scores.dtype).reshape(G, 1, R, 1, 1),
                                  (*scores.shape[:-1], 1)))
  probs = jax.nn.softmax(jnp.concatenate(parts, axis=-1) if len(parts) > 1 else scores)
  rows = lambda x, like: x.reshape(G * B, R * T, -1).astype(like.v.dtype)
  y = held.mixed(rows(probs[..., :S], held))
  if prefix is not None:
    extra = prefix[0]
    y = y + extra.mixed(rows(probs[..., S:S + extra.k.shape[1]], extra)).astype(y.dtype)
  return y.reshape(G, B, R, T, -1).transpose(1, 3, 0, 2, 4).reshape(B, T, H, -1)


def scores_of(q, held, visible, *, scale=None, softcap=None, bias=None):
  """What the softmax is of, [G B R T S] float32, `HIDDEN` where not visible; as `attend_to`."""
  (B, T, H, K), S = q.shape, visible.shape[-1]
  G = held.k.shape[0] // B
  R = H // G
  q = q.reshape(B, T, G, R, K).transpose(2, 0, 3, 1, 4).reshape(G * B, R * T, K)
  scores = held.scores(q)[:, :, :S]
  scores = scores.reshape(G, B, R, T, S) * (K ** -.5 if scale is None else scale)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if bias is not None:
    each = bias.reshape(bias.shape[0], G, R, *bias.shape[2:]).swapaxes(0, 1)
    scores = scores + each.astype(scores.dtype)
  visible = visible.reshape(1, visible.shape[0], 1, *visible.shape[2:])
  return jnp.where(visible, scores, HIDDEN)
