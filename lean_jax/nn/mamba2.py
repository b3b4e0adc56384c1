"""Mamba-2: state space duality (Dao & Gu 2024, arXiv:2405.21060).

Symbols of the paper: h the state, [P N] of each of H heads; A a number a head; B and C shared by
the heads of a group; dt the time step:

  h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Within a chunk this is attention without softmax, y = (L * C B^T) dt x, where L is what is left of
each earlier token (section 6); from chunk to chunk goes the state.
"""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.linear import Linear
from lean_jax.nn.mlp import ACTIVATIONS
from lean_jax.nn.recurrence import ShortConv, over_chunks, packed, time_step_bias

LONGEST = 64                  # tokens: the cost of a token grows with the chunk, a state's does not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Options:
  """The shapes of a Mamba-2 mixer, and what it computes.

  Attributes:
    heads: H.
    head_width: P, channels of a head.
    state: N, numbers that a channel remembers.
    groups: G, of heads that share B and C.
    conv: taps of the convolution.
    bias: whether the first and the last product have biases.
    conv_bias: whether the convolution has them.
    activation: after the convolution, a name of `mlp.ACTIVATIONS`.
    limits: the least and the greatest time step.
    chunk: tokens that are computed as attention, of which more than `LONGEST` are cut; no part of
      the mathematics.
  """
  heads: int
  head_width: int
  state: int = 128
  groups: int = 1
  conv: int = 4
  bias: bool = False
  conv_bias: bool = True
  activation: str = 'silu'
  limits: tuple[float, float] = (0., math.inf)
  chunk: int = 256

  @property
  def inner(self):
    """All channels."""
    return self.heads * self.head_width

  @property
  def joint(self):
    """What the convolution filters: x, B and C."""
    return self.inner + 2 * self.groups * self.state


class Mamba2(nn.Module):
  """out(norm(ssd(conv(in(x))) * silu(gate(x))))."""
  config: Any
  reads = ('in', 'gate', 'dt')
  writes = ('out',)

  @nn.compact
  def __call__(self, x, frame, layer, slot):
    """x [B T D]; the state and the convolution's inputs go through `slot`."""
    B, T, D = x.shape
    c, o = self.config, self.config.mamba2
    x, real, unpacked = packed(x, frame.mask)
    into = lambda name, n, axis: Linear('btd,df->btf', (D, n), ('embed', axis), c.dtype, o.bias,
                                        name=name)(x)
    z, u = into('gate', o.inner, 'mlp'), into('in', o.joint, 'mlp')
    u, inputs = ShortConv(o.conv, o.conv_bias, name='conv')(
        u, real, None if slot is None else slot.get('conv'))
    u = ACTIVATIONS[o.activation](u)                                         # float32
    u, write, read = jnp.split(u, (o.inner, o.inner + o.groups * o.state), axis=-1)
    u = nn.with_logical_constraint(u, ('batch', 'length', 'mlp'))
    u = u.reshape(B, T, o.heads, o.head_width)
    write, read = (x.reshape(B, T, o.groups, o.state) for x in (write, read))
    number = lambda name, start: self.param(name, start, (o.heads,)).astype(jnp.float32)
    dt = into('dt', o.heads, None).astype(jnp.float32)
    dt = nn.softplus(dt + number('dt_bias', time_step_bias).reshape(1, 1, -1))
    dt = jnp.clip(dt, *o.limits)
    if real is not None:
      dt = jnp.where(real[:, :, None], dt, 0)                                # the state stays
    # Uniform in 1 to 16, as in the authors' own models.
    log = lambda key, shape: jnp.log(jax.random.uniform(key, shape, minval=1., maxval=16.))
    a = -jnp.exp(number('A_log', log))
    h = (jnp.zeros((B, o.heads, o.head_width, o.state)) if slot is None else slot.get('state'))
    y, h = ssd(u, dt, a, write, read, h, min(o.chunk, LONGEST))
    y = y + u * number('D', nn.initializers.ones).reshape(1, 1, -1, 1)
    y = GatedNorm(o.groups, c.epsilon, name='norm')(y.reshape(B, T, o.inner), z)
    y = nn.with_logical_constraint(y.astype(c.dtype), ('batch', 'length', 'mlp'))
    y = Linear('btf,fd->btd', (o.inner, D), ('mlp', 'embed'), c.dtype, o.bias, name='out')(y)
    if slot is not None:
      slot = slot.set('conv', inputs).set('state', h)
    return unpacked(y), slot


class GatedNorm(nn.Module):
  """The RMS norm of y * silu(z), each of G groups of channels by itself (section 7.1)."""
  groups: int
  epsilon: float

  @nn.compact
  def __call__(self, y, z):
    """y, z [B T I]; gives [B T I] float32."""
    B, T, I = y.shape
    y = (y * nn.silu(z.astype(jnp.float32))).reshape(B, T, self.groups, -1)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
    scale = self.param('scale', nn.initializers.ones, (I,)).astype(jnp.float32)
    return y.reshape(B, T, I) * scale.reshape(1, 1, I)


def state_shapes(config, batch, length):
  """{name: (shape, dtype)} of a layer's state, however many tokens it has seen."""
  del length
  o = config.mamba2
  return dict(conv=((batch, o.conv - 1, o.joint), config.dtype),
              state=((batch, o.heads, o.head_width, o.state), 'float32'))


def ssd(x, dt, a, b, c, h, chunk):
  """The system of the file's head, without D, in float32.

  Args:
    x: [B T H P].
    dt: [B T H], 0 where a token does not count.
    a: [H], negative.
    b, c: [B T G N].
    h: [B H P N], the state before.
    chunk: tokens that are computed as attention.

  Returns:
    y [B T H P], and the state after the last token.
  """
  B, T, H, P = x.shape
  G, N = b.shape[2:]
  # Of the heads each group has its own: H is G R.
  x, dt, h = x.reshape(B, T, G, -1, P), dt.reshape(B, T, G, -1), h.reshape(B, G, -1, P, N)
  log = dt * a.reshape(1, 1, G, -1)                                          # of the decay
  if T == 1:
    h = jnp.exp(log)[:, 0, :, :, None, None] * h + jnp.einsum(
        'bgrp,bgn->bgrpn', x[:, 0] * dt[:, 0, :, :, None], b[:, 0])
    y = jnp.einsum('bgrpn,bgn->bgrp', h, c[:, 0])[:, None]
  else:
    h, y = over_chunks(_chunk, h, (x * dt[..., None], log, b, c), chunk)
  return y.reshape(B, T, H, P), h.reshape(B, H, P, N)


def _chunk(h, xs):
  """The state after a chunk, of the one before [B G R P N], and y [B T G R P]."""
  x, log, b, c = xs
  left = decays(jnp.moveaxis(log, 1, -1))                                    # [B G R T S]
  scores = jnp.einsum('btgn,bsgn->bgts', c, b)[:, :, None] * left
  y = jnp.einsum('bgrts,bsgrp->btgrp', scores, x)
  since = jnp.exp(jnp.cumsum(log, axis=1))                                   # [B T G R]
  y = y + jnp.einsum('btgn,bgrpn->btgrp', c, h) * since[..., None]
  x = x * jnp.moveaxis(left[..., -1, :], -1, 1)[..., None]
  h = h * since[:, -1, :, :, None, None] + jnp.einsum('bsgrp,bsgn->bgrpn', x, b)
  return h, y


def decays(log):
  """exp(log[s + 1] + ... + log[t]) for t >= s, else 0: [... T S] of [... T].

  Such a sum is a difference of sums from the chunk's start, which would lose its last digits where
  those are large; so what they are rounded by is kept too.
  """
  T = log.shape[-1]
  sums, rest = jax.lax.associative_scan(_add, (log, jnp.zeros_like(log)), axis=-1)
  rest = jax.lax.stop_gradient(rest)                                         # it is zero
  between = lambda x: x[..., :, None] - x[..., None, :]
  within = jnp.tril(jnp.ones((T, T), bool)).reshape((1,) * (log.ndim - 1) + (T, T))
  return jnp.exp(jnp.where(within, between(sums) + between(rest), -jnp.inf))


def _add(first, second):
  """The sum of two numbers and what it was rounded by (Knuth's two-sum), of pairs of such."""
  (a, more), (b, yet_more) = first, second
  total = a + b
  part = total - a
  return total, more + yet_more + ((a - (total - part)) + (b - part))
