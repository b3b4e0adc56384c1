"""Rotary frequencies beyond plain ones: for contexts longer than those of training.

Each kind has `frequencies(theta, width, length)`, [R/2] in radians a position, of a rotated width R
and the sequence's length so far (traced), and `amplitude`, what cosines and sines are multiplied
by. Exponents and frequencies are rounded to float32, as where models were trained: the error of a
frequency grows with the position.
"""
import dataclasses
import math

import jax.numpy as jnp
import numpy as np


def waves(theta, width, over=None):
  """theta ** (k / over), k = 0, 2, ... below the width; `over` is the width if None."""
  exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(over or width)
  # numpy's power of float32 is 2 units in the last place off: .005 radians at position 131072.
  return (np.float64(theta) ** exponents.astype(np.float64)).astype(np.float32)


def plain(theta, width):
  """The plain frequencies, theta ** (-k / width)."""
  return 1 / waves(theta, width)


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions divided by a factor (Chen et al. 2023, arXiv:2306.15595)."""
  factor: float
  amplitude = 1.

  def frequencies(self, theta, width, length):
    del length
    return plain(theta, width) / np.float32(self.factor)


@dataclasses.dataclass(frozen=True)
class Dynamic:
  """A base that grows with the sequence once that is longer than `original` (NTK-aware scaling).

  Peng et al. 2023 (arXiv:2309.00071), section 3.3.
  """
  factor: float
  original: int                 # tokens that a sequence had in training
  amplitude = 1.

  def frequencies(self, theta, width, length):
    length = jnp.asarray(length, jnp.float32)
    stretch = self.factor * length / self.original - (self.factor - 1)
    # At least 1, where it is not used: a root of a negative number would be NaN.
    base = theta * jnp.maximum(stretch, 1.) ** (width / (width - 2))
    exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
    return jnp.where(length > self.original, 1 / base ** exponents, plain(theta, width))


@dataclasses.dataclass(frozen=True)
class Yarn:
  """Low frequencies divided by a factor, high ones left, a ramp between (arXiv:2309.00071).

  Attributes:
    factor: by which the context is longer.
    original: tokens that a sequence had in training.
    attention_factor: the amplitude; None is the paper's, or a ratio where both mscales are given.
    beta_fast, beta_slow: turns within `original` from which a frequency is left, and up to which
      it is divided.
    mscale, mscale_all: what the ratio's logarithms are multiplied by, above and below.
    truncate: whether the ends of the ramp are rounded to whole frequencies.
  """
  factor: float
  original: int
  attention_factor: float | None = None
  beta_fast: float = 32.
  beta_slow: float = 1.
  mscale: float | None = None
  mscale_all: float | None = None
  truncate: bool = True

  @property
  def amplitude(self):
    if self.attention_factor is not None:
      return self.attention_factor
    if self.mscale and self.mscale_all:
      return yarn_scale(self.factor, self.mscale) / yarn_scale(self.factor, self.mscale_all)
    return yarn_scale(self.factor)

  def frequencies(self, theta, width, length):
    del length
    low, high = self._ramp(theta, width)
    along = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    divided, near = np.clip(along, 0, 1), plain(theta, width)
    return near / np.float32(self.factor) * divided + near * (1 - divided)

  def _ramp(self, theta, width):
    turned = lambda turns: (width * math.log(self.original / (turns * 2 * math.pi))
                            / (2 * math.log(theta)))
    low, high = turned(self.beta_fast), turned(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high if high != low else high + .001


def yarn_scale(factor, multiple=1.):
  """0.1 multiple ln(factor) + 1, YaRN's growth of scores (arXiv:2309.00071, equation 22)."""
  return 1. if factor <= 1 else .1 * multiple * math.log(factor) + 1


@dataclasses.dataclass(frozen=True)
class LongRope:
  """Each frequency divided by its own factor, of two sets of them (arXiv:2402.13753).

  Attributes:
    short, long: the factors, [R/2], of sequences up to `original` tokens and beyond.
    original: tokens that a sequence had in training.
    amplitude: what cosines and sines are multiplied by.
  """
  short: tuple[float, ...]
  long: tuple[float, ...]
  original: int
  amplitude: float = 1.

  def frequencies(self, theta, width, length):
    short, long = (1 / (np.asarray(factors, np.float32) * waves(theta, width))
                   for factors in (self.short, self.long))
    return jnp.where(length > self.original, long, short)


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Long waves stretched by a factor, short ones left, those between blended (Llama 3.1's).

  Attributes:
    factor: of the wave lengths above original / low.
    low, high: `original` over these are the lengths between which waves are blended, in tokens.
    original: tokens that a sequence had in training.
  """
  factor: float
  low: float
  high: float
  original: int
  amplitude = 1.

  def frequencies(self, theta, width, length):
    del length
    near = plain(theta, width)
    turns = np.float32(self.original) / (np.float32(2 * math.pi) / near)     # within `original`
    left = np.clip((turns - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)
    return (1 - left) * near / np.float32(self.factor) + left * near


@dataclasses.dataclass(frozen=True)
class Proportional:
  """All features turn in pairs over the whole head, but only the fastest `fraction` of them at all.

  Others, though they pass through, keep their places in the pairs (k, k + K/2), as in Gemma 4.
  """
  fraction: float = 1.
  factor: float = 1.
  amplitude = 1.

  def frequencies(self, theta, width, length):
    del length
    turning = int(self.fraction * width // 2)
    near = 1 / waves(theta, 2 * turning, over=width) / np.float32(self.factor)
    return np.concatenate([near, np.zeros(width // 2 - turning, np.float32)])


Scaling = Linear | Dynamic | Yarn | LongRope | Llama3 | Proportional
