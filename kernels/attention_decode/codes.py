"""Keys and values in codes: their arrays, and the numbers that they stand for.

Liu et al. 2024 (KIVI, arXiv:2402.02750), section 3: a channel's keys share a grid along g tokens, a
token's values share one along some channels.
"""
from typing import Any, NamedTuple

import jax.numpy as jnp


class Codes(NamedTuple):
  """Keys or values of S tokens in each of N rows; K channels.

  Attributes:
    values: [N S*bits/8 K], uint8; of 4 bits, two tokens that follow each other share a byte, the
      first in its low bits.
    scale, least: of the numbers code * scale + least, float16: of keys [N S/g K], of values
      [N S C], C dividing K.
  """
  values: Any
  scale: Any
  least: Any


def apart(codes, bits, dtype, *, per_token):
  """The numbers [N S/n K] of the first, the second, ... of each n tokens that share a byte.

  Args:
    codes: Codes.
    bits: 8 or 4.
    dtype: of the numbers, which are computed in float32.
    per_token: whether they are values; else keys.
  """
  (N, rows, K), each = codes.values.shape, 8 // bits
  out = []
  for k in range(each):
    part = (codes.values >> (k * bits)) & (2 ** bits - 1)
    if per_token:
      part, axis = part.reshape(N, rows, codes.scale.shape[2], -1), 3
    else:
      part, axis = part.reshape(N, codes.scale.shape[1], -1, K), 2
    own = lambda x, k=k, axis=axis: jnp.expand_dims(
        (x[:, k::each] if per_token else x).astype(jnp.float32), axis)
    wide = part.astype(jnp.float32) * own(codes.scale) + own(codes.least)
    out.append(wide.astype(dtype).reshape(N, rows, K))
  return out


def joined(parts):
  """`apart`'s numbers, [N S K]."""
  N, rows, K = parts[0].shape
  return jnp.stack(parts, axis=2).reshape(N, rows * len(parts), K)
