"""LSTM (Hochreiter & Schmidhuber 1997), with forget gates (Gers et al. 2000).

  i, f, g, o = W x_t + U h_{t-1} + b
  c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.linear import Linear, weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMOptions:
  """The shape of an LSTM.

  Attributes:
    inner: I, the width of its state.
  """
  inner: int


class LSTM(nn.Module):
  """out(h) of an LSTM over the tokens; the four gates are one product of x and one of h."""
  config: Any
  reads = ('in',)
  writes = ('out',)

  @nn.compact
  def __call__(self, x, frame, layer, slot):
    """x [B T D]; h and c, float32, go through `slot`."""
    B, T, D = x.shape
    config, I = self.config, self.config.lstm.inner
    gates = Linear('btd,dgf->btgf', (D, 4, I), ('embed', None, 'mlp'), config.dtype, name='in')(x)
    gates = gates.astype(jnp.float32) + self.param('bias', _bias, (4, I)).astype(
        jnp.float32).reshape(1, 1, 4, I)
    recurrent = weight(self, 'recurrent', 'ioo', (I, 4, I), ('embed', None, 'mlp'))
    real = jnp.ones((B, T), bool) if frame.mask is None else frame.mask

    def step(state, xs):
      h, c = state
      gates, real = xs
      more = recurrent.einsum('bi,igf->bgf', h.astype(config.dtype))
      i, f, g, o = jnp.moveaxis(gates + more.astype(jnp.float32), 1, 0)      # [B I] each
      new_c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
      new_h = nn.sigmoid(o) * jnp.tanh(new_c)
      keep = lambda new, old: jnp.where(real[:, None], new, old)
      h, c = keep(new_h, h), keep(new_c, c)
      return (h, c), h
    zeros = jnp.zeros((B, I))
    state = (zeros, zeros) if slot is None else (slot.get('h'), slot.get('c'))
    (h, c), y = jax.lax.scan(step, state, (jnp.moveaxis(gates, 1, 0), real.T))
    if slot is not None:
      slot = slot.set('h', h).set('c', c)
    y = jnp.moveaxis(y, 0, 1).astype(config.dtype)                           # [B T I]
    y = nn.with_logical_constraint(y, ('batch', 'length', 'mlp'))
    return Linear('btf,fd->btd', (I, D), ('mlp', 'embed'), config.dtype, name='out')(y), slot


def _bias(key, shape):
  """Zeros, and ones for the forget gates (Jozefowicz et al. 2015, section 2.2)."""
  del key
  return jnp.zeros(shape).at[1].set(1)


def state_shapes(config, batch, length):
  """{name: (shape, dtype)} of a layer's state, however many tokens it has seen."""
  del length
  shape = (batch, config.lstm.inner)
  return dict(h=(shape, 'float32'), c=(shape, 'float32'))
