"""Distillation on the teacher's distribution over the next token."""
import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.kernels.distill_loss import api as distill_loss
from lean_jax.kernels.distill_loss.kinds import forward_kl
from lean_jax.objectives.forward import forward, hidden, targets, token_axes
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
  _check(logits.shape[-1], target.shape[-1], temperature)
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  log_p = jax.nn.log_softmax(jax.lax.stop_gradient(target).astype(jnp.float32) / temperature)
  kl = forward_kl(log_q, log_p)                                    # [B T]
  return temperature ** 2 * jnp.sum(kl * mask) / jnp.maximum(jnp.sum(mask), 1)


def distillation(student, teacher, *, temperature, soft_weight):
  """soft_weight * soft labels + (1 - soft_weight) * hard labels.

  Neither's logits are ever all in memory where both are products with a matrix of floats; see
  `kernels.distill_loss`.

  Args:
    student, teacher: modules with the same vocabulary.
    temperature: of the soft labels.
    soft_weight: 0 to 1.

  Returns:
    The loss (params, batch, key, teacher_params=) -> (scalar, metrics): the teacher is an argument
    of the compiled step, inside it, and has no gradient.
  """
  def loss(params, batch, key, *, teacher_params):
    del key
    wanted, mask = targets(batch)
    one = hidden(student, params, batch)
    other = None if one is None else hidden(teacher, teacher_params, batch)
    if other is not None:
      _check(student.config.vocabulary, teacher.config.vocabulary, temperature)
      value, parts = distill_loss.distill_loss(
          one.states, one.matrix, other.states, other.matrix, temperature=temperature,
          labels=wanted.reshape(-1), weights=mask.reshape(-1), soft_weight=soft_weight,
          student=one.head, teacher=other.head, axes=token_axes())
      return value + one.auxiliary, parts
    logits, auxiliary = forward(student, params, batch)
    target, _ = forward(teacher, teacher_params, batch)
    soft = soft_labels(logits, target, mask, temperature=temperature)
    hard = cross_entropy(logits, wanted, mask)
    return soft_weight * soft + (1 - soft_weight) * hard + auxiliary, dict(soft=soft, hard=hard)
  return loss


def _check(student, teacher, temperature):
  """Raises InputError for vocabularies, or a temperature, of which there are no soft labels."""
  if student != teacher:
    raise InputError(f'the student has a vocabulary of {student} and the teacher of {teacher}; '
                     'soft labels need the same tokenizer in both')
  if not temperature > 0:
    raise InputError(f'temperature {temperature} is not positive; 1 to 4 are usual')
