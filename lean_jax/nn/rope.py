"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""
import jax.numpy as jnp


def rotation(positions, head_width, theta):
  """Cosines and sines of each position's angles, [T K/2] each, float32.

  Args:
    positions: [T], integer.
    head_width: K, even.
    theta: the base of the angles' frequencies.
  """
  frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x, cos, sin):
  """x [B T H K], its pairs (k, k + K/2), those of Hugging Face's Llama, turned by their angles."""
  cos, sin = cos[None, :, None, :].astype(x.dtype), sin[None, :, None, :].astype(x.dtype)
  low, high = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
