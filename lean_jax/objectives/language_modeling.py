"""The cross-entropy of the next token, or of labels."""
import jax
import jax.numpy as jnp

from lean_jax.kernels.distill_loss import api as distill_loss
from lean_jax.objectives.forward import forward, hidden, masked_mean, targets, token_axes


def cross_entropy(logits, wanted, mask):
  """Mean of -log p(wanted), in nats a token.

  Args:
    logits: [B T V], or [B V]; float, computed in float32.
    wanted: [B T] or [B], integer.
    mask: as wanted, 1 where it counts.
  """
  return masked_mean(_nll(logits, wanted), mask)


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


def next_token(module):
  """The loss of a model on its targets: (params, batch, key) -> (nats a token, metrics).

  A batch is as in `forward`; a mixture of experts adds its auxiliary losses. The logits are never
  all in memory where they are a product with a matrix of floats; see `kernels.distill_loss`.
  """
  def loss(params, batch, key):
    del key
    wanted, mask = targets(batch)
    x = hidden(module, params, batch)
    if x is not None:
      nll = distill_loss.cross_entropy(x.states, x.matrix, wanted.reshape(-1), head=x.head,
                                       weights=mask.reshape(-1), axes=token_axes())
      return nll + x.auxiliary, {}
    outputs, auxiliary = forward(module, params, batch)
    return cross_entropy(outputs, wanted, mask) + auxiliary, {}
  return loss
