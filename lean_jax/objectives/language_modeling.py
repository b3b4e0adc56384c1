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
  logits = logits.astype(jnp.float32)
  wanted = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll = jax.nn.logsumexp(logits, axis=-1) - wanted                # [B T]
  return jnp.sum(nll * mask) / jnp.maximum(jnp.sum(mask), 1)


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
