"""Normalisation."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    D = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (D,))
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    return (wide * inverse * scale.reshape((1,) * (x.ndim - 1) + (D,))).astype(self.dtype)
