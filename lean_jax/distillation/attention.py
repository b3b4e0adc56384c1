"""Distillation on attention: on scores, on probabilities, and on relations between tokens.

Rows of padding do not count, and no token is related to padding.
"""
import jax
import jax.numpy as jnp

from lean_jax.kernels.distill_loss.kinds import forward_kl
from lean_jax.nn.attention import HIDDEN
from lean_jax.objectives.forward import masked_mean


def attention_mse(student, teacher, mask):
  """MSE of the scores before the softmax, the mean over heads and the pairs that both see.

  Jiao et al. 2019 (TinyBERT, arXiv:1909.10351), equation 7. Gradients do not reach the teacher.

  Args:
    student, teacher: [B H T S] float32, `HIDDEN` where a query does not see a key.
    mask: [B T], 1 where the token is real.
  """
  seen, student, teacher = _seen(student, teacher)
  counts = seen * mask.astype(jnp.float32)[:, None, :, None]
  return masked_mean((student - teacher) ** 2, counts)


def attention_kl(student, teacher, mask):
  """KL(teacher || student) of the attention probabilities, the mean over heads and real tokens.

  Wang et al. 2020 (MiniLM, arXiv:2002.10957), section 3.1. Each softmax is over the keys that both
  see. Args are as `attention_mse` has them.
  """
  seen, *scores = _seen(student, teacher)
  log_q, log_p = (jax.nn.log_softmax(jnp.where(seen, x, HIDDEN)) for x in scores)
  return _mean(forward_kl(log_q, log_p), mask)


def relation_kl(student, teacher, mask, heads):
  """KL(teacher || student) of softmax(X X' / sqrt(d)), the mean over heads and real tokens.

  X is a layer's queries, keys or values, its heads joined and cut in `heads` of width d again, so
  that student and teacher may have other numbers and widths of heads: Wang et al. 2020 (MiniLMv2,
  arXiv:2012.15828), section 3.2. Of values, with the number of heads that both have, it is the
  value relation of MiniLM (arXiv:2002.10957), section 3.2. Gradients do not reach the teacher.

  Args:
    student, teacher: [B T H K] and [B T G L]; heads divides H K and G L.
    mask: [B T], 1 where the token is real.
    heads: of relations.
  """
  relate = lambda x: _log_relations(x, mask, heads)
  return _mean(forward_kl(relate(student), relate(jax.lax.stop_gradient(teacher))), mask)


def _log_relations(x, mask, heads):
  """log softmax(X X' / sqrt(d)) over real tokens, [B A T T], of [B T H K]."""
  B, T = x.shape[:2]
  x = x.reshape(B, T, heads, -1)
  scores = jnp.einsum('btad,bsad->bats', x, x, preferred_element_type=jnp.float32)
  scores = scores * x.shape[-1] ** -.5
  return jax.nn.log_softmax(jnp.where(mask.astype(bool)[:, None, None], scores, HIDDEN))


def _seen(student, teacher):
  """Where both see, and the scores, 0 elsewhere."""
  teacher = jax.lax.stop_gradient(teacher)
  seen = (student > HIDDEN) & (teacher > HIDDEN)
  return seen, jnp.where(seen, student, 0), jnp.where(seen, teacher, 0)


def _mean(kl, mask):
  """Of [B A T], over heads and real tokens."""
  mask = jnp.broadcast_to(mask.astype(jnp.float32)[:, None], kl.shape)
  return masked_mean(kl, mask)
