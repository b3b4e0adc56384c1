"""The oracle of attention_decode: all codes as floats, and a softmax over all tokens."""
import jax
import jax.numpy as jnp

from lean_jax.kernels.attention_decode.codes import apart, joined


def attention_decode(how, q, k, v, visible, length, recent, sinks):
  """As `api.attention_decode`; k and v are Codes of N rows, `how` a Scores."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  k, v = (joined(apart(x, how.bits, wide, per_token=t)) for x, t in ((k, False), (v, True)))
  S = k.shape[1]
  visible = visible & (jnp.arange(S) < length)[None]
  if recent is not None:
    near, seen = recent
    k, v = (jnp.concatenate([x, y.astype(wide)], axis=1) for x, y in zip((k, v), near))
    visible = jnp.concatenate([visible, seen], axis=1)
  scores = how.of(jnp.einsum('nrk,nsk->nrs', q.astype(wide), k, precision='highest'))
  visible = jnp.tile(visible, (q.shape[0] // visible.shape[0], 1))[:, None]
  scores = jnp.where(visible, scores, -jnp.inf)
  if sinks is not None:
    scores = jnp.concatenate([scores, sinks.astype(wide)[..., None]], axis=-1)
  probs = jax.nn.softmax(scores)[..., :k.shape[1]]
  probs = jnp.where(jnp.all(scores == -jnp.inf, axis=-1, keepdims=True), 0, probs)
  return jnp.einsum('nrs,nsk->nrk', probs, v, precision='highest').astype(q.dtype)
