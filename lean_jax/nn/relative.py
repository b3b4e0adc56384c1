"""Relative positions: scores that depend on how far a key is from a query."""
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class RelativeOptions:
  """How distances are put in buckets.

  Attributes:
    buckets: how many scores each head learns.
    distance: from this one on, all keys are in a direction's last bucket.
  """
  buckets: int = 32
  distance: int = 128


class RelativeBias(nn.Module):
  """What attention adds to its scores, a learned number for each head and bucket of distances.

  Raffel et al. 2019 (arXiv:1910.10683), section 2.1. All layers of a stack share it.
  """
  config: Any                   # of the stack: `relative`, `heads`, `causal`

  @nn.compact
  def __call__(self, distance):
    """[1 H T S] of distance [T S], from key to query: positive for keys before it."""
    c, o = self.config, self.config.relative
    table = self.param('table', nn.initializers.normal(c.width ** -.5), (o.buckets, c.heads))
    found = bucket(distance, o.buckets, o.distance, not c.causal)
    return jnp.take(table, found, axis=0).transpose(2, 0, 1)[None]             # [1 H T S]


def bucket(distance, buckets, farthest, both):
  """The bucket of each distance, int32.

  Half of a direction's buckets are one distance wide; the others grow as its logarithm does.

  Args:
    distance: integers, from key to query.
    buckets: how many there are.
    farthest: the distance at which the logarithm would leave the last one.
    both: whether keys after a query have the second half of the buckets; else they are in the
      first bucket with the query's own.
  """
  n = buckets // 2 if both else buckets
  far = jnp.abs(distance) if both else jnp.maximum(distance, 0)
  # Looked up: a device's logarithm may round across the edge of a bucket.
  found = jnp.take(jnp.asarray(edges(n, farthest)), jnp.minimum(far, farthest))
  return jnp.where(distance < 0, n, 0) + found if both else found


@functools.lru_cache
def edges(buckets, farthest):
  """The bucket of each distance from 0 to `farthest` in one direction, int32."""
  exact = buckets // 2
  far = np.arange(farthest + 1)
  steps = np.log(np.maximum(far, 1).astype(np.float32) / exact) / np.log(farthest / exact)
  wide = exact + (steps.astype(np.float32) * (buckets - exact)).astype(np.int32)
  return np.where(far < exact, far, np.minimum(wide, buckets - 1)).astype(np.int32)
