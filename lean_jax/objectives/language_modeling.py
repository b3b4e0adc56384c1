"""The next token's cross-entropy."""
import jax
import jax.numpy as jnp


def cross_entropy(logits, targets, mask):
  """Mean of -log p(target), in nats a token.

  Args:
    logits: [B T V], float; computed in float32.
    targets: [B T], integer.
    mask: [B T], 1 where the token counts.
  """
  return jnp.sum(_nll(logits, targets) * mask) / jnp.maximum(jnp.sum(mask), 1)


@jax.custom_vjp
def _nll(logits, targets):
  """-log p(target), [B T] float32. Its gradient is written out: no scatter, one pass."""
  return _forward(logits, targets)[0]


def _forward(logits, targets):
  wide = logits.astype(jnp.float32)
  wanted = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
  total = jax.nn.logsumexp(wide, axis=-1)
  return total - wanted, (logits, targets, total)


def _backward(saved, g):
  logits, targets, total = saved
  V = logits.shape[-1]
  hit = targets[..., None] == jnp.arange(V).reshape((1,) * targets.ndim + (V,))
  probs = jnp.exp(logits.astype(jnp.float32) - total[..., None])
  return ((probs - hit) * g[..., None]).astype(logits.dtype), None


_nll.defvjp(_forward, _backward)


def shifted(batch):
  """Targets [B T] and their mask: the token after each, the last one having none."""
  tokens = batch['tokens']
  targets = jnp.roll(tokens, -1, axis=1)
  inside = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1, tokens.shape)
  return targets, inside.astype(jnp.float32)


def next_token(module):
  """The loss of a language model: (params, batch, key) -> (nats a token, metrics)."""
  def loss(params, batch, key):
    del key
    logits, _ = module.apply({'params': params}, batch['tokens'])
    value = cross_entropy(logits, *shifted(batch))
    return value, {}
  return loss
