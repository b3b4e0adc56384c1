"""Distillation on how alike the geometry of hidden states is."""
import jax
import jax.numpy as jnp


def cka(student, teacher, mask):
  """1 - linear CKA of the features of all real tokens: |Y'X|^2 / (|X'X| |Y'Y|), X and Y centred.

  Kornblith et al. 2019 (arXiv:1905.00414), section 3. It is the same for all rotations and scales
  of the features, so that widths may differ with nothing learned between them. Gradients do not
  reach the teacher.

  Args:
    student: [B T D]; teacher: [B T E]; any float, computed in float32.
    mask: [B T], 1 where the token is real.
  """
  mask = mask.astype(jnp.float32)[..., None]                                     # [B T 1]

  def centred(x):
    x = x.astype(jnp.float32)
    mean = jnp.sum(x * mask, axis=(0, 1)) / jnp.maximum(jnp.sum(mask), 1)
    return (x - mean.reshape(1, 1, -1)) * mask
  square = lambda a, b: jnp.sum(jnp.einsum('btd,bte->de', a, b) ** 2)
  x, y = centred(student), centred(jax.lax.stop_gradient(teacher))
  scale = square(x, x) * square(y, y)
  # Features that are the same of all tokens are like nothing: 0, and no gradient that is a NaN.
  return 1 - square(y, x) / jnp.sqrt(jnp.where(scale > 0, scale, 1.))
