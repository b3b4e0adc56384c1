"""Causal attention over whole sequences, for training: nothing of size T x T is kept.

The backward pass makes the probabilities again, from what the forward pass keeps: queries, keys,
values and the result (Dao et al. 2022, arXiv:2205.14135, section 3.1). Queries are taken in blocks,
and keys after a block are not looked at.
"""
import jax
import jax.numpy as jnp
import numpy as np

LONG = 64                     # queries from which two blocks pay


def causal_attention(q, k, v, scale=None, segments=None):
  """softmax(scale q k) v, each query seeing the keys up to its own; the softmax in float32.

  Args:
    q: [B T H K].
    k: [B T G K], G dividing H.
    v: [B T G W].
    scale: None is 1 / sqrt(K).
    segments: [B T], integer: a query sees the keys of its own number; None lets it see all.

  Returns:
    [B T H W], in q's dtype.
  """
  B, T, H, K = q.shape
  G = k.shape[2]
  q = q * jnp.asarray(K ** -.5 if scale is None else scale, q.dtype)
  q = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)                    # [B G R T K]
  k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)                       # [B G T K]
  return _attend(q, k, v, segments).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


@jax.custom_vjp
def _attend(q, k, v, segments):
  return jnp.concatenate(
      [_rows(_product(_probabilities(q[:, :, :, rows], k[:, :, :end], start, segments),
                      v[:, :, :end], 3, 2), q[:, :, :, rows])
       for rows, start, end in _blocks(q.shape[3])], axis=3)


def _forward(q, k, v, segments):
  y = _attend(q, k, v, segments)
  return y, (q, k, v, y, segments)


def _backward(saved, dy):
  q, k, v, y, segments = saved
  T = q.shape[3]
  delta = jnp.sum(dy.astype(jnp.float32) * y, axis=-1, keepdims=True)           # [B G R T 1]
  dq, dk, dv = [], 0., 0.
  for rows, start, end in _blocks(T):
    part, keys = q[:, :, :, rows], k[:, :, :end]
    p = _probabilities(part, keys, start, segments)                             # [B G R*C S]
    upstream = _merged(dy[:, :, :, rows])
    ds = p.astype(jnp.float32) * (
        _product(upstream, v[:, :, :end], 3, 3, jnp.float32) - _merged(delta[:, :, :, rows]))
    ds = ds.astype(q.dtype)
    dq.append(_rows(_product(ds, keys, 3, 2), part))
    later = ((0, 0), (0, 0), (0, T - end), (0, 0))
    dk += jnp.pad(_product(ds, _merged(part), 2, 2), later)
    dv += jnp.pad(_product(p, upstream, 2, 2), later)
  return jnp.concatenate(dq, axis=3), dk, dv, None


_attend.defvjp(_forward, _backward)


def _blocks(T):
  """(rows, first, end) of each block of queries."""
  C = T // 2 if T >= LONG and T % 2 == 0 else T
  return [(slice(s, s + C), s, s + C) for s in range(0, T, C)]


def _probabilities(q, k, start, segments):
  """[B G R*C S] of q [B G R C K], whose first query is number `start`, and k [B G S K]."""
  _, _, R, C, _ = q.shape
  scores = _product(_merged(q), k, 3, 3, jnp.float32)
  seen = (np.arange(k.shape[2])[None] <= np.tile(np.arange(start, start + C), R)[:, None])[None]
  if segments is not None:
    own = jnp.tile(segments[:, start:start + C], (1, R))
    seen = seen & (own[:, :, None] == segments[:, None, :k.shape[2]])           # [B R*C S]
  return jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf)).astype(q.dtype)


def _product(a, b, i, j, dtype=None):
  """Over axis i of a and j of b, for each [B G]."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _merged(x):
  B, G, R, C, K = x.shape
  return x.reshape(B, G, R * C, K)


def _rows(x, like):
  return x.reshape(*like.shape[:4], -1)
