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
from jax.sharding import PartitionSpec

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
  reads = ('router', 'experts/gate', 'experts/up', 'shared/gate', 'shared/up')
  writes = ('experts/down', 'shared/down')

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
    weights, rows = Experts(o, D, name='experts')(), rows.astype(c.dtype)
    if o.capacity is None:
      y = on_each_device(functools.partial(dropless, options=o), weights, rows, chosen, share)
    else:
      y = bounded(functools.partial(feed_forward, weights, options=o), rows, chosen, share,
                  o.experts, o.capacity, mask)
    y = y.astype(c.dtype).reshape(B, T, D)
    if o.shared_hidden is not None:
      y = y + MLP(dataclasses.replace(c, hidden=o.shared_hidden), name='shared')(x, frame)
    return y


class Experts(nn.Module):
  """The weights of E experts, by name: {gate, up, down: (kernel [E I O], bias [E O] or None)}."""
  options: MoEOptions
  width: int

  @nn.compact
  def __call__(self):
    D, F = self.width, self.options.hidden
    into = lambda name: ExpertLinear(self.options, (D, F), ('embed', 'mlp'), name=name)()
    return dict(gate=into('gate'), up=into('up'),
                down=ExpertLinear(self.options, (F, D), ('mlp', 'embed'), name='down')())


class ExpertLinear(nn.Module):
  """The kernel and the bias of each expert; called, they are given."""
  options: MoEOptions
  shape: tuple[int, int]        # [I O]
  axes: tuple

  @nn.compact
  def __call__(self):
    E, zeros = self.options.experts, nn.initializers.zeros
    kernel = weight(self, 'kernel', 'eio', (E, *self.shape), ('experts', *self.axes))
    if not self.options.bias:
      return kernel, None
    return kernel, kernel.bias(self.param('bias', zeros, (E, self.shape[1])))


def feed_forward(weights, x, sizes=None, *, options):
  """down(f(gate(x)) * up(x)) of each expert on its rows.

  Args:
    weights: as `Experts` gives them.
    x: [M D], first the rows of expert 0, then those of expert 1, ...; or [E C D].
    sizes: [E], how many rows of [M D] each has; None of [E C D].
    options: MoEOptions.
  """
  def product(name, x):
    kernel, bias = weights[name]
    y = kernel.einsum('eci,eio->eco', x) if sizes is None else kernel.grouped(x, sizes)
    if bias is None:
      return y
    each = bias[:, None] if sizes is None else (
        jnp.repeat(bias, sizes, axis=0, total_repeat_length=x.shape[0]))
    return y + each.astype(y.dtype)
  o, gate, up = options, product('gate', x), product('up', x)
  h = gated(o.activation, gate, up) if o.limit is None else clamped(gate, up, o.limit, o.alpha)
  if sizes is None:
    h = nn.with_logical_constraint(h, ('experts', None, 'mlp'))
  return product('down', h)


def clamped(gate, up, limit, alpha):
  """The gate of gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both bounded."""
  gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return (up + 1) * gate * nn.sigmoid(alpha * gate)


def on_each_device(f, weights, *rows):
  """f(weights, *rows), each device of the mesh in use taking its part of the rows, if they divide.

  Left to itself, the compiler would sort the rows of all devices together, on every device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1 or mesh.manual_axes or rows[0].shape[0] % mesh.size:
    return f(weights, *rows)
  whole, part = PartitionSpec(), PartitionSpec(mesh.axis_names)
  return jax.shard_map(f, in_specs=(whole, *[part] * len(rows)), out_specs=part,
                       check_vma=False)(weights, *rows)


def dropless(weights, x, chosen, share, options):
  """The sum of each row's experts' outputs, weighed: [M D], float32.

  Args:
    weights: as `Experts` gives them.
    x: [M D].
    chosen, share: [M k], the experts of each row and their weights.
    options: MoEOptions.
  """
  M, k = chosen.shape
  expert = chosen.reshape(M * k)
  order = jnp.argsort(expert, stable=True)
  back = jnp.argsort(order)
  sizes = jnp.bincount(expert, length=options.experts)
  y = feed_forward(weights, taken(x, order, back, k), sizes, options=options)
  y = taken(y, back, order, 1).reshape(M, k, -1).astype(jnp.float32)
  return jnp.sum(y * share[:, :, None], axis=1)


def bounded(run, x, chosen, share, experts, capacity, mask=None):
  """As `dropless`, each expert having room for `capacity` times its even share of the choices.

  Rows that the mask [M] leaves out take no room. `run` is what experts do to rows [E C D].
  """
  (M, k), E = chosen.shape, experts
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
  y = run(filled).reshape(E * C, -1)[jnp.where(kept, expert * C + at, 0)].astype(jnp.float32)
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
