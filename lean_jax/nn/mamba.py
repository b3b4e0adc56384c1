"""Mamba: a state space whose parameters depend on the token (Gu & Dao 2023, arXiv:2312.00752).

Symbols of the paper: h the state, [N] of each of I channels; A, B, C, D the system; dt the time
step, which makes it discrete (sections 2 and 3.2, equation 2a, with B discretised as dt B):

  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.linear import Linear
from lean_jax.nn.mlp import ACTIVATIONS
from lean_jax.nn.norm import RMSNorm
from lean_jax.nn.recurrence import ShortConv, over_chunks, packed, time_step_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaOptions:
  """The shapes of a Mamba mixer, and what it computes.

  Attributes:
    inner: I, channels.
    state: N, numbers that a channel remembers.
    rank: of the product that makes time steps.
    conv: taps of the convolution.
    bias: whether the first and the last product have biases.
    conv_bias: whether the convolution has them.
    activation: after the convolution, a name of `mlp.ACTIVATIONS`.
    norm: whether dt, B and C are normalised, as in Jamba (arXiv:2403.19887, section 6.4).
    chunk: tokens whose states are in memory at once; no part of the mathematics.
  """
  inner: int
  state: int = 16
  rank: int
  conv: int = 4
  bias: bool = False
  conv_bias: bool = True
  activation: str = 'silu'
  norm: bool = False
  chunk: int = 32


class Mamba(nn.Module):
  """out(scan(conv(in(x))) * silu(gate(x)))."""
  config: Any
  reads = ('in', 'gate')
  writes = ('out',)

  @nn.compact
  def __call__(self, x, frame, layer, slot):
    """x [B T D]; the state and the convolution's inputs go through `slot`."""
    B, _, D = x.shape
    c, o = self.config, self.config.mamba
    x, real, unpacked = packed(x, frame.mask)
    into = lambda name: Linear('btd,df->btf', (D, o.inner), ('embed', 'mlp'), c.dtype, o.bias,
                               name=name)(x)
    u, z = into('in'), into('gate')                                          # [B T I]
    u = nn.with_logical_constraint(u, ('batch', 'length', 'mlp'))
    u, inputs = ShortConv(o.conv, o.conv_bias, name='conv')(
        u, real, None if slot is None else slot.get('conv'))
    u = ACTIVATIONS[o.activation](u)                                         # float32
    dt, write, read = self._selected(u.astype(c.dtype))
    if real is not None:
      dt = jnp.where(real[:, :, None], dt, 0)                                # the state stays
    log = lambda key, shape: jnp.broadcast_to(jnp.log(jnp.arange(1., o.state + 1))[None], shape)
    a = -jnp.exp(self.param('A_log', log, (o.inner, o.state)).astype(jnp.float32))
    h = jnp.zeros((B, o.state, o.inner)) if slot is None else slot.get('state')
    y, h = selective_scan(u, dt, a.T, write, read, h, o.chunk)
    skip = self.param('D', nn.initializers.ones, (o.inner,)).astype(jnp.float32)
    y = (y + u * skip.reshape(1, 1, -1)) * nn.silu(z.astype(jnp.float32))
    y = nn.with_logical_constraint(y.astype(c.dtype), ('batch', 'length', 'mlp'))
    y = Linear('btf,fd->btd', (o.inner, D), ('mlp', 'embed'), c.dtype, o.bias, name='out')(y)
    if slot is not None:
      slot = slot.set('conv', inputs).set('state', h)
    return unpacked(y), slot

  def _selected(self, u):
    """dt [B T I], and B and C [B T N], float32, of u [B T I] (section 3.2, algorithm 2)."""
    c, o = self.config, self.config.mamba
    parts = Linear('btf,fr->btr', (o.inner, o.rank + 2 * o.state), ('mlp', None), c.dtype,
                   name='select')(u)
    dt, write, read = jnp.split(parts, (o.rank, o.rank + o.state), axis=-1)
    if o.norm:
      dt, write, read = (RMSNorm(c.epsilon, c.dtype, name=f'{name}_norm')(x)
                         for name, x in (('dt', dt), ('B', write), ('C', read)))
    dt = Linear('btr,rf->btf', (o.rank, o.inner), (None, 'mlp'), c.dtype, name='dt')(dt)
    bias = self.param('dt_bias', time_step_bias, (o.inner,)).astype(jnp.float32)
    dt = nn.softplus(dt.astype(jnp.float32) + bias.reshape(1, 1, -1))
    return dt, write.astype(jnp.float32), read.astype(jnp.float32)


def state_shapes(config, batch, length):
  """{name: (shape, dtype)} of a layer's state, however many tokens it has seen."""
  del length
  o = config.mamba
  return dict(conv=((batch, o.conv - 1, o.inner), config.dtype),
              state=((batch, o.state, o.inner), 'float32'))


def selective_scan(u, dt, a, b, c, h, chunk):
  """The system of the file's head, without D, in float32.

  Args:
    u: [B T I].
    dt: [B T I], 0 where a token does not count.
    a: [N I], negative.
    b, c: [B T N].
    h: [B N I], the state before.
    chunk: tokens whose states are in memory at once.

  Returns:
    y [B T I], and the state after the last token.
  """
  if u.shape[1] == 1:
    h = jnp.exp(dt[:, 0, None] * a[None]) * h + b[:, 0, :, None] * (dt * u)[:, 0, None]
    return jnp.einsum('bni,bn->bi', h, c[:, 0])[:, None], h

  def body(h, xs):
    u, dt, b, c = xs
    decay = jnp.exp(dt[:, :, None] * a[None, None])                          # [B C N I]
    hs = recurrence(decay, b[:, :, :, None] * (dt * u)[:, :, None], h)
    return hs[:, -1], jnp.einsum('btni,btn->bti', hs, c)
  h, y = over_chunks(body, h, (u, dt, b, c), chunk)
  return y, h


@jax.custom_vjp
def recurrence(a, b, h):
  """h_t = a_t h_{t-1} + b_t along axis 1, by an associative scan: a and b [B T ...], h [B ...].

  The gradient is the same recurrence, backwards in time.
  """
  b = b.at[:, 0].add(a[:, 0] * h)
  return jax.lax.associative_scan(_joined, (a, b), axis=1)[1]


def _joined(first, second):
  (a, b), (c, d) = first, second
  return a * c, b * c + d


def _forward(a, b, h):
  hs = recurrence(a, b, h)
  return hs, (a, hs, h)


def _backward(saved, d):
  a, hs, h = saved
  after = jnp.concatenate([a[:, 1:], jnp.zeros_like(a[:, :1])], axis=1)
  _, d = jax.lax.associative_scan(_joined, (after, d), axis=1, reverse=True)
  before = jnp.concatenate([h[:, None], hs[:, :-1]], axis=1)
  return d * before, d, a[:, 0] * d[:, 0]


recurrence.defvjp(_forward, _backward)
