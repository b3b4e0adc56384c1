"""Normalisation, in float32."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class RMSNorm(nn.Module):
  """x / rms(x) * (offset + scale) (Zhang & Sennrich 2019, arXiv:1910.07467)."""
  epsilon: float
  dtype: Any = jnp.float32
  offset: float = 0.            # Gemma stores scales less one

  @nn.compact
  def __call__(self, x):
    D = x.shape[-1]
    start = nn.initializers.constant(1. - self.offset)
    scale = self.offset + _row(self.param('scale', start, (D,)), x).astype(jnp.float32)
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    return (wide * inverse * scale).astype(self.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / deviation * scale + bias (Ba et al. 2016, arXiv:1607.06450)."""
  epsilon: float
  dtype: Any = jnp.float32
  bias: bool = True
  scale: bool = True

  @nn.compact
  def __call__(self, x):
    D = x.shape[-1]
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
    y = wide * inverse
    if self.scale:
      y = y * _row(self.param('scale', nn.initializers.ones, (D,)), x)
    if self.bias:
      y = y + _row(self.param('bias', nn.initializers.zeros, (D,)), x)
    return y.astype(self.dtype)


def norm(config, name=None):
  """A norm as a stack's config has it."""
  c = config
  if c.norm == 'rms':
    return RMSNorm(c.epsilon, c.dtype, c.norm_offset, name=name)
  return LayerNorm(c.epsilon, c.dtype, c.norm_bias, c.norm_scale, name=name)


def _row(vector, like):
  return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
