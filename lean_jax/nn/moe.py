"""Mixture of experts: a feed-forward block of which each token uses a few parts.

Dropless (Gale et al. 2022, arXiv:2211.15841, section 2): tokens are sorted by expert, and each
expert multiplies its own, however many. With a capacity (Lepikhin et al. 2020, arXiv:2006.16668,
section 2.2) each expert has room for a fixed number, and what is over it is dropped.
"""
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.linear import weight
from lean_jax.nn.mlp import MLP, gated
from lean_jax.nn.router import Router, RouterOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEOptions:
  """What a mixture of experts computes.

  Attributes:
    experts: E.
    hidden: F, of one expert.
    router: how a token's experts are chosen.
    shared_hidden: width of an expert that every token uses besides; None for none.
    activation: f in down(f(gate) * up), a name of `mlp.ACTIVATIONS`.
    limit: None, or the bound L of gpt-oss, of down((up + 1) * gate * sigmoid(alpha * gate)): gate
      at most L, up within -L and L.
    alpha: of `limit`.
    bias: whether the experts' products have biases.
    capacity: None drops nothing. Otherwise an expert takes `capacity` times its even share of the
      tokens of a call, first choices before second ones; the others go without it.
  """
  experts: int
  hidden: int
  router: RouterOptions
  shared_hidden: int | None = None
  activation: str = 'silu'
  limit: float | None = None
  alpha: float = 1.702
  bias: bool = False
  capacity: float | None = None


class MoE(nn.Module):
  """The sum of what a token's experts give, as its router weighs them, and the shared one's."""
  config: Any

  @nn.compact
  def __call__(self, x, frame):
    """x [B T D], of which frame.mask tells the real tokens; gives [B T D]."""
    B, T, D = x.shape
    c, o = self.config, self.config.moe
    rows = x.reshape(B * T, D)
    mask = None if frame.mask is None else frame.mask.reshape(B * T)
    layers = sum(layer.feed_forward == 'moe' for layer in c.each)
    chosen, share = Router(o.router, o.experts, layers, name='router')(rows, mask)     # [M k]
    self.sow('taps', 'chosen', chosen.reshape(B, T, -1))
    experts = Experts(o, D, c.dtype, name='experts')
    if o.capacity is None:
      y = dropless(experts, rows.astype(c.dtype), chosen, share)
    else:
      y = bounded(experts, rows.astype(c.dtype), chosen, share, mask, o.capacity)
    y = y.astype(c.dtype).reshape(B, T, D)
    if o.shared_hidden is not None:
      y = y + MLP(dataclasses.replace(c, hidden=o.shared_hidden), name='shared')(x, frame)
    return y


class Experts(nn.Module):
  """down(f(gate(x)) * up(x)) of E experts, each on rows of its own."""
  options: MoEOptions
  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x, sizes=None):
    """x [M D], sorted by expert, of whom each has sizes [E]; or [E C D], each having C."""
    o, D, F = self.options, self.width, self.options.hidden
    product = lambda name, i, o_, axes: ExpertLinear(
        (o.experts, i, o_), ('experts', *axes), self.dtype, o.bias, name=name)
    gate = product('gate', D, F, ('embed', 'mlp'))(x, sizes)
    up = product('up', D, F, ('embed', 'mlp'))(x, sizes)
    h = gated(o.activation, gate, up) if o.limit is None else clamped(gate, up, o.limit, o.alpha)
    h = nn.with_logical_constraint(h, ('experts', None, 'mlp')[-h.ndim:])
    return product('down', F, D, ('mlp', 'embed'))(h, sizes)


class ExpertLinear(nn.Module):
  """x @ kernel + bias, a kernel and a bias for each expert."""
  shape: tuple[int, int, int]   # [E I O]
  axes: tuple
  dtype: Any
  bias: bool

  @nn.compact
  def __call__(self, x, sizes):
    """As `Experts`: [M O] or [E C O]."""
    E, _, O = self.shape
    w = weight(self, 'kernel', 'eio', self.shape, self.axes)
    x = x.astype(self.dtype)
    y = w.einsum('eci,eio->eco', x) if sizes is None else w.grouped(x, sizes)
    if self.bias:
      b = self.param('bias', nn.initializers.zeros, (E, O)).astype(y.dtype)
      y = y + (b[:, None] if sizes is None else
               jnp.repeat(b, sizes, axis=0, total_repeat_length=x.shape[0]))
    return y


def clamped(gate, up, limit, alpha):
  """The gate of gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both bounded."""
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return (up + 1) * gate * nn.sigmoid(alpha * gate)


def dropless(experts, x, chosen, share):
  """The sum of each row's experts' outputs [M D], float32, of rows x [M D] and [M k] choices."""
  M, k = chosen.shape
  expert = chosen.reshape(M * k)
  order = jnp.argsort(expert, stable=True)
  back = jnp.argsort(order)
  sizes = jnp.bincount(expert, length=experts.options.experts)
  y = taken(experts(taken(x, order, back, k), sizes), back, order, 1)
  return jnp.sum(y.reshape(M, k, -1).astype(jnp.float32) * share[:, :, None], axis=1)


def bounded(experts, x, chosen, share, mask, capacity):
  """As `dropless`, each expert having room for `capacity` times its even share of the choices.

  Rows that the mask [M] leaves out take no room.
  """
  (M, k), E = chosen.shape, experts.options.experts
  C = min(M, math.ceil(capacity * M * k / E))
  real = jnp.ones((M, k), bool) if mask is None else jnp.broadcast_to(mask[:, None], (M, k))
  expert = jnp.where(real, chosen, E).T.reshape(k * M)                 # all first choices first
  order = jnp.argsort(expert, stable=True)
  sizes = jnp.bincount(expert, length=E)                               # the E + 1st is cut off
  start = jnp.cumsum(sizes) - sizes
  at = jnp.argsort(order) - start[jnp.minimum(expert, E - 1)]          # within its expert
  kept = (expert < E) & (at < C)
  place = jnp.arange(C)[None]
  token = order[jnp.minimum(start[:, None] + place, k * M - 1)] % M    # [E C]
  filled = jnp.where((place < sizes[:, None])[:, :, None], x[token], 0)
  y = experts(filled).reshape(E * C, -1)
  y = y[jnp.where(kept, expert * C + at, 0)].astype(jnp.float32)
  y = jnp.where(kept[:, None], y, 0).reshape(k, M, -1)
  return jnp.sum(y * share.T[:, :, None], axis=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def taken(x, index, inverse, each):
  """Rows x[index // each], x standing for `each` copies of itself; `inverse` undoes `index`.

  Its gradient is taken as well, and not scattered.
  """
  return x[index // each]


def _backward(each, inverse, g):
  g = g[inverse]
  return jnp.sum(g.reshape(-1, each, g.shape[1]), axis=1, dtype=g.dtype), None, None


taken.defvjp(lambda x, index, inverse, each: (x[index // each], inverse), _backward)
