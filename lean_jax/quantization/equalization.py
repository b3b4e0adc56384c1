"""Scales that move difficulty between a weight's inputs and its rows.

Weights that see the same input share one scale s [I] for each of its channels: input i is divided
by s[i], and row i of each weight multiplied by it, which changes no product of floats. Dividing is
free where the operation before takes it in, and a product otherwise (`weights.Rescaled`).
"""

import jax.numpy as jnp
from flax.core import meta

from lean_jax.weights.base import from_matrix, to_matrix, unstacked

LEAST = 1e-5                  # of a scale


def scaled(w, s):
  """A Dense weight [I O] with row i times s[i], s [*e I]; the same for each expert if s is [I]."""
  value = meta.unbox(w)
  matrix = to_matrix(value, w.dims)
  matrix = matrix * broadcast(s, matrix)[..., None].astype(value.dtype)
  return w.replace_boxed(from_matrix(matrix, w.dims, unstacked(value.shape, w.dims)))


def broadcast(s, matrix):
  """s [I] or [*e I] as [*e I] of a matrix [*e I O]."""
  return jnp.broadcast_to(s.reshape((1,) * (matrix.ndim - 1 - s.ndim) + s.shape),
                          matrix.shape[:-1])


def out_scaled(w, s):
  """A Dense weight whose output o is divided by s[o], s [O] or [*e O]."""
  value = meta.unbox(w)
  matrix = to_matrix(value, w.dims)
  by = s.reshape((1,) * (matrix.ndim - 1 - s.ndim) + s.shape)[..., None, :]
  return w.replace_boxed(from_matrix((matrix / by).astype(value.dtype), w.dims,
                                     unstacked(value.shape, w.dims)))


def divided_norm(norm, s, offset):
  """A norm's parameters {scale, bias} such that its output is divided by s [D]."""
  out = dict(norm, scale=((norm['scale'] + offset) / s - offset).astype(norm['scale'].dtype))
  if 'bias' in norm:
    out['bias'] = (norm['bias'] / s).astype(norm['bias'].dtype)
  return out


def tidy(s):
  """Scales around 1, none of them too small: s over the root of its largest times its least."""
  s = jnp.maximum(s, LEAST)
  return s / jnp.sqrt(jnp.max(s, axis=-1, keepdims=True) * jnp.min(s, axis=-1, keepdims=True))
