"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""
import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rope:
  """Plain rotary frequencies with base theta."""
  theta: float = 10_000.
  interleaved: bool = False


def rotation(rope, positions, head_width):
  """Cosines and sines of each position's angles, [B T K/2] each, float32."""
  frequency = rope.theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  angle = positions.astype(jnp.float32)[..., None] * frequency[None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x, cos, sin, interleaved=False):
  """x [B T H K], its pairs (k, k + K/2), those of Hugging Face's Llama, turned by their angles."""
  cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
  low, high = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
