"""The feed-forward block."""
from typing import Any

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
    h = nn.silu(into('gate')) * into('up')                       # [B T F]
    h = nn.with_logical_constraint(h, ('batch', 'length', 'mlp'))
    return Linear('btf,fd->btd', (self.hidden, D), ('mlp', 'embed'), self.dtype, name='down')(h)
