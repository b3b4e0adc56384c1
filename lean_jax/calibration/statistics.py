"""What a weight's inputs are like: sums over tokens, so that those of batches add up."""
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lean_jax.kernels.grouped_matmul import api as grouped_matmul
from lean_jax.quantization.codes import magnitude

BINS, EACH, LEAST = 512, 16, -20          # of sizes: so many an octave, from 2 ** LEAST on


class Statistics(struct.PyTreeNode):
  """Of the inputs [*e M I] of a weight, by expert where it has experts.

  Attributes:
    rows: [*e], M, how many inputs there were.
    second: [*e I I], the sum of x x^T; None if it was not asked for.
    size: [*e I], the sum of |x|.
    top: [*e I], the largest |x|; NaN where there was one.
    histogram: [*e BINS], how many |x| of each size there were, see `quantile`; None if it was not
      asked for, or is not known.
    finite: [*e], bool, whether there was no NaN and no infinity.
  """
  rows: jax.Array
  second: jax.Array | None
  size: jax.Array
  top: jax.Array
  histogram: jax.Array | None
  finite: jax.Array

  def add(self, other):
    """Of both inputs."""
    joined = jax.tree.map(jnp.add, self.replace(top=0, finite=0), other.replace(top=0, finite=0))
    return joined.replace(top=jnp.maximum(self.top, other.top),
                          finite=self.finite & other.finite)

  def divided(self, s):
    """Of the inputs divided by s [I]; their histogram is not known then."""
    row = s.reshape((1,) * (self.top.ndim - 1) + s.shape)
    second = self.second
    if second is not None:
      second = second / row[..., :, None] / row[..., None, :]
    return self.replace(second=second, size=self.size / row, top=self.top / row, histogram=None)


def of_matrix(x, weights=None, *, second=True, histogram=True):
  """Statistics of inputs [*e M I]; those of weight 0, of weights [M], are left out."""
  x = x.astype(jnp.float32)
  keep = jnp.ones(x.shape[-2:-1], bool) if weights is None else weights.astype(bool)
  x = jnp.where(keep.reshape((1,) * (x.ndim - 2) + (-1, 1)), x, 0)
  size, batch = jnp.abs(x), x.shape[:-2]
  count = jnp.sum(keep, dtype=jnp.float32)
  counts = None
  if histogram:
    real = jnp.broadcast_to(keep[:, None], x.shape[-2:]).reshape(-1).astype(jnp.float32)
    each = _bins(size).reshape(-1, real.size)
    counts = jax.vmap(lambda b: jnp.bincount(b, real, length=BINS))(each).reshape(*batch, BINS)
  return Statistics(
      jnp.broadcast_to(count, batch),
      jnp.swapaxes(x, -1, -2) @ x if second else None,
      jnp.sum(size, axis=-2), magnitude(x, -2),
      counts, jnp.all(jnp.isfinite(x), axis=(-2, -1)))


def of_groups(x, sizes, *, second=True, histogram=True):
  """Statistics [E ...] of inputs [M I], first those of expert 0; `sizes` [E] of each expert."""
  x, E, I = x.astype(jnp.float32), sizes.shape[0], x.shape[-1]
  size = jnp.abs(x)
  expert = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=x.shape[0])
  total = lambda v: jax.ops.segment_sum(v, expert, E, indices_are_sorted=True)
  outer = None
  if second:                   # the gradient of a grouped product is the sum of x dy^T of a group
    zeros = jnp.zeros((E, I, I), jnp.float32)
    _, gradient = jax.vjp(lambda w: grouped_matmul.grouped_matmul(x, w, sizes), zeros)
    outer, = gradient(x)
  counts = None
  if histogram:
    bins = (expert[:, None] * BINS + _bins(size)).reshape(-1)
    counts = jnp.bincount(bins, length=E * BINS).reshape(E, BINS).astype(jnp.float32)
  top = jax.ops.segment_max(size, expert, E, indices_are_sorted=True)
  return Statistics(
      sizes.astype(jnp.float32), outer, total(size), jnp.maximum(top, 0),
      counts, total((~jnp.isfinite(x)).any(axis=1).astype(jnp.int32)) == 0)


def quantile(histogram, part):
  """The size that `part` of the values [... BINS] are below; within 2.2%."""
  share = jnp.cumsum(histogram, axis=-1) / jnp.maximum(jnp.sum(histogram, axis=-1, keepdims=True),
                                                       1)
  return sizes()[jnp.argmax(share >= part, axis=-1)]


def sizes():
  """[BINS] float32, the middles of the bins."""
  return jnp.asarray(2. ** (LEAST + (np.arange(BINS) + .5) / EACH), jnp.float32)


def _bins(size):
  place = jnp.floor((jnp.log2(jnp.maximum(size, 2. ** LEAST)) - LEAST) * EACH)
  return jnp.clip(jnp.nan_to_num(place), 0, BINS - 1).astype(jnp.int32)
