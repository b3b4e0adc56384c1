"""Rotary positions (Su et al. 2021, arXiv:2104.09864)."""
import dataclasses

import jax.numpy as jnp

from lean_jax.nn.rope_scaling import Scaling, plain


@dataclasses.dataclass(frozen=True)
class Rope:
  """How positions turn the features of a head, in pairs.

  Attributes:
    theta: the base of the frequencies, theta ** (-2k/R) for pair k.
    fraction: of a head's K features that are turned, the first R = int(K fraction).
    interleaved: whether pairs are features (2k, 2k+1) instead of (k, k + R/2).
    scaling: another choice of frequencies, a kind of `rope_scaling`; None is the plain one.
  """
  theta: float = 10_000.
  fraction: float = 1.
  interleaved: bool = False
  scaling: Scaling | None = None

  def width(self, head_width):
    """R, the features of a head that are turned."""
    return int(head_width * self.fraction)


def rotation(rope, positions, head_width):
  """Cosines and sines of the angles at each position.

  Where frequencies depend on the length, it is the largest of all positions, plus one: a batch's
  longest row decides.

  Args:
    rope: a `Rope`.
    positions: [B T], integer.
    head_width: K.

  Returns:
    cos, sin: [B T R/2] each, float32, times the scaling's amplitude.
  """
  width, scaling = rope.width(head_width), rope.scaling
  if scaling is None:
    frequencies = plain(rope.theta, width)
  else:
    frequencies = scaling.frequencies(rope.theta, width, jnp.max(positions) + 1)
  angle = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if scaling is None or scaling.amplitude == 1:
    return cos, sin
  return cos * scaling.amplitude, sin * scaling.amplitude


def rotate(x, cos, sin, interleaved=False):
  """x [B T H K] with its first R features turned, in pairs, by the angles of cos, sin [B T R/2]."""
  R = 2 * cos.shape[-1]
  cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
  turned = x if x.shape[-1] == R else x[..., :R]
  if interleaved:
    pairs = turned.reshape(*turned.shape[:-1], R // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
  else:
    a, b = jnp.split(turned, 2, axis=-1)
    y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return y if x.shape[-1] == R else jnp.concatenate([y, x[..., R:]], axis=-1)
