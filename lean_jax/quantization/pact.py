"""PACT: activations are clipped at a learned level, which is their range in 8 bits."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.kernels.fake_quant import reference
from lean_jax.weights.base import pytree
from lean_jax.weights.trained import with_inputs


def pact(w, level):
  """The weight, in training as w8a8, whose activations are clipped at +-alpha, alpha learned.

  Choi et al. 2018 (arXiv:1805.06085), section 3, for activations of both signs: the paper's are
  those of a ReLU, in [0, alpha]. Its L2 penalty on alpha is the weight decay of AdamW, which alpha
  is not spared. The weight is then one of w8a8-static, and `rtn(w, 'w8a8-static')` stores it.

  Args:
    w: of `fake_quantize(w, 'w8a8')` or `lsq(w, 'w8a8')`.
    level: alpha's start; the paper's is 10.

  Raises:
    InputError: the level is not positive, or the weight is of another kind or scheme.
  """
  if not level > 0:
    raise InputError(f'a level of {level} clips all activations; give a positive one, 10 say')
  return with_inputs(w, lambda shape: Clip(jnp.full(shape, level, jnp.float32)))


@pytree
class Clip:
  """A range +-level of activations, learned by the gradient of what it clips."""
  level: Any                                           # alpha: [*n *e], float32

  @property
  def step(self):
    """The size of a code, [*n *e]."""
    return jnp.maximum(self.level, jnp.finfo(jnp.float32).tiny) / 127

  def rounded(self, x):
    """x [*e M K] in the range of each matrix."""
    return clipped(x, self.step[..., None, None])

  def rounded_rows(self, x, sizes):
    """x [M K], `sizes` rows of each expert, in the range of each."""
    step = jnp.repeat(self.step, sizes, total_repeat_length=x.shape[0])
    return clipped(x, step[:, None])

  def names(self, batch):
    """The logical names of the level's axes."""
    return dataclasses.replace(self, level=batch)


@jax.custom_vjp
def clipped(x, step):
  """x [..., K] rounded to multiples of step [..., 1] in -127 to 127.

  Its gradient to x is 1 within alpha = 127 step, else 0; that to alpha is the sign of x beyond it,
  else 0 (PACT, equation 3).
  """
  return reference.fake_quant_fixed(x, step)


def _backward(saved, g):
  x, step = saved
  alpha = 127 * step
  beyond = jnp.abs(x.astype(jnp.float32)) >= alpha
  dalpha = jnp.where(beyond, jnp.sign(x.astype(jnp.float32)) * g.astype(jnp.float32), 0)
  axes = tuple(k for k, n in enumerate(step.shape) if n == 1)
  return jnp.where(beyond, 0, g), 127 * jnp.sum(dalpha, axis=axes, keepdims=True)


clipped.defvjp(lambda x, step: (clipped(x, step), (x, step)), _backward)
