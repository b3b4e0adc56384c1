"""Causal self-attention with grouped keys and values."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.causal import causal_attention
from lean_jax.nn.linear import Linear
from lean_jax.nn.rope import rotate


class Attention(nn.Module):
  """Multi-head attention, the key and value heads shared by groups (arXiv:2305.13245)."""
  heads: int
  groups: int
  head_width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, cos, sin, mask, cache, offset):
    """Attends.

    Args:
      x: [B T D].
      cos, sin: [T K/2], of the queries' positions.
      mask: [T S], True where a query may see a key of the cache; unused without one.
      cache: None, or the keys and values so far, dict(k, v) of [B S G K].
      offset: where in the cache the first query stands; unused without one.

    Returns:
      [B T D], and the cache with the new keys and values in it (None without one).
    """
    B, T, D = x.shape
    H, G, K = self.heads, self.groups, self.head_width
    into = lambda name, n: Linear('btd,df->btf', (D, n * K), ('embed', 'heads'), self.dtype,
                                  name=name)(x).reshape(B, T, n, K)
    q, k, v = into('q', H), into('k', G), into('v', G)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is not None:
      put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
          old, new.astype(old.dtype), offset, axis=1)
      cache = dict(k=put(cache['k'], k), v=put(cache['v'], v))
      y = attend(q, cache['k'].astype(self.dtype), cache['v'].astype(self.dtype), mask)
    else:
      y = causal_attention(q, k, v)
    y = y.reshape(B, T, H * K)
    y = nn.with_logical_constraint(y, ('batch', 'length', 'heads'))
    return Linear('btf,fd->btd', (H * K, D), ('heads', 'embed'), self.dtype, name='o')(y), cache


def attend(q, k, v, mask):
  """softmax(q k / sqrt(K)) v where `mask` lets it, the softmax in float32.

  Args:
    q: [B T H K].
    k, v: [B S G K], G dividing H.
    mask: [T S], bool.

  Returns:
    [B T H K], in q's dtype.
  """
  B, T, H, K = q.shape
  G = k.shape[2]
  q = q.reshape(B, T, G, H // G, K)
  scores = jnp.einsum('btghk,bsgk->bghts', q, k, preferred_element_type=jnp.float32) * K ** -.5
  probs = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf))   # [B G H/G T S]
  y = jnp.einsum('bghts,bsgk->btghk', probs.astype(v.dtype), v)
  return y.reshape(B, T, H, K)
