"""The feed-forward block."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class MLPOptions:
  """What a feed-forward block computes.

  Attributes:
    gated: down(f(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202) instead of down(f(up(x))).
    activation: f, a name of `ACTIVATIONS`.
    bias: whether the products have biases.
  """
  gated: bool = True
  activation: str = 'silu'
  bias: bool = False


ACTIVATIONS = dict(
    silu=nn.silu, relu=nn.relu, tanh=jnp.tanh,
    gelu=functools.partial(nn.gelu, approximate=False),
    gelu_tanh=functools.partial(nn.gelu, approximate=True))


class MLP(nn.Module):
  """down(f(gate(x)) * up(x)), or down(f(up(x)))."""
  config: Any
  reads = ('gate', 'up')        # the weights that multiply x itself
  writes = ('down',)            # and those whose products are the result

  @nn.compact
  def __call__(self, x, frame):
    del frame
    _, _, D = x.shape
    c, o = self.config, self.config.mlp
    into = lambda name: Linear('btd,df->btf', (D, c.hidden), ('embed', 'mlp'), c.dtype, o.bias,
                               name=name)(x)
    h = gated(o.activation, into('gate'), into('up')) if o.gated else (
        ACTIVATIONS[o.activation](into('up')))                   # [B T F]
    h = nn.with_logical_constraint(h, ('batch', 'length', 'mlp'))
    return Linear('btf,fd->btd', (c.hidden, D), ('mlp', 'embed'), c.dtype, o.bias, name='down')(h)


def gated(activation, gate, up):
  """f(gate) * up."""
  return silu_gate(gate, up) if activation == 'silu' else ACTIVATIONS[activation](gate) * up


@jax.custom_vjp
def silu_gate(gate, up):
  """silu(gate) * up, keeping only the two for the backward pass."""
  return nn.silu(gate) * up


def _backward(saved, d):
  gate, up = saved
  s = nn.sigmoid(gate)
  return d * up * s * (1 + gate * (1 - s)), d * gate * s


silu_gate.defvjp(lambda gate, up: (silu_gate(gate, up), (gate, up)), _backward)
