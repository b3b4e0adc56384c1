"""The choice of a token from logits."""
import jax
import jax.numpy as jnp


def sample(logits, key, temperature, top_p, top_k):
  """Token ids [B] of logits [B V].

  Args:
    logits: float32.
    key: a jax PRNG key; unused where temperature is None.
    temperature: > 0, divides the logits; None takes the largest.
    top_p: the fewest most probable tokens that together have this probability are kept (Holtzman
      et al. 2019, arXiv:1904.09751, section 3.1); None keeps all.
    top_k: so many of the most probable are kept, before top_p looks; None keeps all.
  """
  if temperature is None:
    return jnp.argmax(logits, axis=-1)
  _, V = logits.shape
  # Less their maximum, logits divided by a tiny temperature end at -inf, never at nan.
  logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
  if top_k is not None:
    least = jax.lax.top_k(logits, min(top_k, V))[0][:, -1:]       # [B 1]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is not None:
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered)
    kept = jnp.cumsum(probs, axis=-1) - probs < top_p             # [B V], by rank
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
  return jax.random.categorical(key, logits)
