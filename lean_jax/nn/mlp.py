"""The feed-forward block."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.linear import Linear


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202, SwiGLU)."""
  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    _, _, D = x.shape
    into = lambda name: Linear('btd,df->btf', (D, self.hidden), ('embed', 'mlp'), self.dtype,
                               name=name)(x)
    h = silu_gate(into('gate'), into('up'))                      # [B T F]
    h = nn.with_logical_constraint(h, ('batch', 'length', 'mlp'))
    return Linear('btf,fd->btd', (self.hidden, D), ('mlp', 'embed'), self.dtype, name='down')(h)


@jax.custom_vjp
def silu_gate(gate, up):
  """silu(gate) * up, keeping only the two for the backward pass."""
  return nn.silu(gate) * up


def _backward(saved, d):
  gate, up = saved
  s = nn.sigmoid(gate)
  return d * up * s * (1 + gate * (1 - s)), d * gate * s


silu_gate.defvjp(lambda gate, up: (silu_gate(gate, up), (gate, up)), _backward)
