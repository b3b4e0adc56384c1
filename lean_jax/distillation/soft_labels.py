"""Distillation on the teacher's distribution over the next token."""
import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.objectives.forward import forward, targets
from lean_jax.objectives.language_modeling import cross_entropy


def soft_labels(logits, target, mask, *, temperature):
  """KL(target || logits) at a temperature, in nats a token, times temperature squared.

  Hinton et al. 2015 (arXiv:1503.02531), section 2. Gradients do not reach `target`.

  Args:
    logits, target: [B T V], or [B V]; any float, computed in float32.
    mask: [B T] or [B], 1 where it counts.
    temperature: > 0; 1 leaves the distributions as they are.

  Raises:
    InputError: vocabularies differ, or the temperature is not positive.
  """
  if logits.shape != target.shape:
    raise InputError(f'the student has a vocabulary of {logits.shape[-1]} and the teacher of '
                     f'{target.shape[-1]}; soft labels need the same tokenizer in both')
  if not temperature > 0:
    raise InputError(f'temperature {temperature} is not positive; 1 to 4 are usual')
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  log_p = jax.nn.log_softmax(jax.lax.stop_gradient(target).astype(jnp.float32) / temperature)
  kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)          # [B T]
  return temperature ** 2 * jnp.sum(kl * mask) / jnp.maximum(jnp.sum(mask), 1)


def distillation(student, teacher, *, temperature, soft_weight):
  """soft_weight * soft labels + (1 - soft_weight) * hard labels.

  Args:
    student, teacher: modules with the same vocabulary.
    temperature: of the soft labels.
    soft_weight: 0 to 1.

  Returns:
    The loss (params, batch, key, teacher=the teacher's params) -> (scalar, metrics): the teacher
    is an argument of the compiled step, inside it, and has no gradient.
  """
  def loss(params, batch, key, *, teacher_params):
    del key
    wanted, mask = targets(batch)
    logits, auxiliary = forward(student, params, batch)
    target, _ = forward(teacher, teacher_params, batch)
    soft = soft_labels(logits, target, mask, temperature=temperature)
    hard = cross_entropy(logits, wanted, mask)
    return soft_weight * soft + (1 - soft_weight) * hard + auxiliary, dict(soft=soft, hard=hard)
  return loss
