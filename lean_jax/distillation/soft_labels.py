"""Distillation on the teacher's distribution over the next token, of logits."""
import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.kernels.distill_loss.kinds import buckets, divergence
from lean_jax.objectives.forward import masked_mean


def soft_labels(logits, target, mask, *, temperature, kind='forward_kl', **options):
  """The divergence at a temperature, in nats a token, times temperature squared.

  Hinton et al. 2015 (arXiv:1503.02531), section 2, whose is KL(target || logits). Gradients do not
  reach `target`.

  Args:
    logits, target: [B T V], or [B V]; any float, computed in float32.
    mask: [B T] or [B], 1 where it counts.
    temperature: > 0; 1 leaves the distributions as they are. An array is not checked.
    kind, **options: of the divergence, as `kernels.distill_loss` has them.

  Raises:
    InputError: vocabularies differ, or the temperature is not positive.
    ValueError: no such kind or option.
  """
  V = logits.shape[-1]
  if target.shape[-1] != V:
    raise InputError(f'the student has a vocabulary of {V} and the teacher of {target.shape[-1]}; '
                     'soft labels need the same tokenizer in both')
  if not isinstance(temperature, jax.Array) and not temperature > 0:
    raise InputError(f'temperature {temperature} is not positive; 1 to 4 are usual')
  between, options = divergence(kind, options, V)
  log_q, log_p = (jax.nn.log_softmax(x.reshape(-1, V).astype(jnp.float32) / temperature)
                  for x in (logits, jax.lax.stop_gradient(target)))
  each = between(log_q, log_p, **dict(options)).reshape(mask.shape)              # [B T]
  return temperature ** 2 * masked_mean(each, mask)


def known_labels(logits, known, mask, *, temperature, kind='forward_kl', **options):
  """`soft_labels` of a teacher of whose distributions k tokens are known, all others being one.

  The temperature is of the k + 1 probabilities, in student and teacher.

  Args:
    logits: as there.
    known: a `distill_loss` Known, of the positions of the mask joined.
    mask, temperature, kind, options: as there.
  """
  V = logits.shape[-1]
  between, options = divergence(kind, options, V)
  log_q = buckets(jax.nn.log_softmax(logits.reshape(-1, V).astype(jnp.float32)), known.ids)
  log_q, log_p = (jax.nn.log_softmax(x / temperature)
                  for x in (log_q, jax.lax.stop_gradient(known.log_probs)))
  each = between(log_q, log_p, **dict(options)).reshape(mask.shape)              # [B T]
  return temperature ** 2 * masked_mean(each, mask)
