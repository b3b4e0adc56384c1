"""Distillation on hidden states: of layers, or of the embedding."""
import jax
import jax.numpy as jnp

from lean_jax.objectives.forward import masked_mean


def hidden_mse(student, teacher, mask, projection=None, mixture=None):
  """MSE(student W, teacher), the mean over real tokens and the teacher's features.

  Jiao et al. 2019 (TinyBERT, arXiv:1909.10351), equations 8 and 9. Gradients do not reach the
  teacher.

  Args:
    student: [B T D]; teacher: [B T E]; any float, computed in float32.
    mask: [B T], 1 where the token is real.
    projection: W [D E]; None where E is D.
    mixture: None, or [N], weights of the teacher's layers, which are then [N B T E].
  """
  y, target = _pair(student, teacher, projection, mixture)
  return masked_mean(jnp.mean((y - target) ** 2, axis=-1), mask.astype(jnp.float32))


def hidden_cosine(student, teacher, mask, projection=None, mixture=None):
  """1 - cos(student W, teacher), the mean over real tokens.

  Sanh et al. 2019 (DistilBERT, arXiv:1910.01108), section 2. Args are as `hidden_mse` has them.
  """
  y, target = _pair(student, teacher, projection, mixture)
  return masked_mean(1 - jnp.sum(_unit(y) * _unit(target), axis=-1), mask.astype(jnp.float32))


def _pair(student, teacher, projection, mixture):
  student = student.astype(jnp.float32)
  teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
  if projection is not None:
    student = jnp.einsum('btd,de->bte', student, projection)
  if mixture is not None:
    teacher = jnp.einsum('n,nbte->bte', mixture, teacher)
  return student, teacher


def _unit(x):
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
