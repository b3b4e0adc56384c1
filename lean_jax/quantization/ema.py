"""Ranges of activations as moving averages of what was seen."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.kernels.fake_quant import reference
from lean_jax.quantization.codes import magnitude
from lean_jax.weights.base import pytree, static
from lean_jax.weights.trained import with_inputs


def ema(w, decay):
  """The weight, in training as w8a8, whose activations have the average range of past batches.

  Jacob et al. 2018 (arXiv:1712.05877), section 3.1: ranges are exponential moving averages of what
  training sees, 'with the smoothing parameter being close to 1'. The weight is then one of
  w8a8-static, and `rtn(w, 'w8a8-static')` stores it.

  Nothing is mutated. The range is an array of the weight, and its cotangent is no derivative but
  (1 - decay) times its distance from the batch's greatest magnitude, so that one step of descent at
  rate 1 is the moving average: `averaged(tx)` takes that step, and `training.recipe.train` does so
  wherever there are such ranges. So it goes through jit, scan, remat, accumulation and shardings as
  gradients do: of microbatches, and of a weight that is used twice, the distances are averaged and
  added. A loop that leaves `averaged` out would feed them to its optimizer. Experts that shard_map
  spreads over devices add one distance for each device.

  To calibrate a model without training it, let nothing else train: trainable='.*/inputs/range'.

  Args:
    w: of `fake_quantize(w, 'w8a8')` or `lsq(w, 'w8a8')`.
    decay: 0 to below 1; the first batch is taken whole.

  Raises:
    InputError: the decay is out of range, or the weight is of another kind or scheme.
  """
  if not 0 <= decay < 1:
    raise InputError(f'a decay of {decay}; give one from 0 to below 1, .99 say')
  return with_inputs(w, lambda shape: Average(jnp.zeros(shape), decay))


@pytree
class Average:
  """A range +-range of activations, which follows the greatest magnitude of each batch."""
  range: Any                                           # [*n *e], float32; 0 before the first batch
  decay: float = static()

  @property
  def step(self):
    """The size of a code, [*n *e]; NaN before the first batch."""
    return jnp.where(self.range > 0, self.range, jnp.nan) / 127

  def rounded(self, x):
    """x [*e M K] in the range of each matrix; in its own before the first batch."""
    top = magnitude(x.astype(jnp.float32), (-2, -1))
    step = followed(self.range, top, self.decay)
    return fixed(x, step[..., None, None])

  def rounded_rows(self, x, sizes):
    """x [M K], `sizes` rows of each expert, in the range of each."""
    expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
    top = magnitude(x.astype(jnp.float32), -1)
    top = jax.ops.segment_max(top, expert, sizes.shape[0], indices_are_sorted=True)
    step = followed(self.range, jnp.maximum(top, 0), self.decay)
    return fixed(x, step[expert][:, None])

  def names(self, batch):
    """The logical names of the range's axes."""
    return dataclasses.replace(self, range=batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def followed(range, top, decay):
  """The step [...] of a range [...], or of a batch's top magnitude [...] before there is one.

  The cotangent of the range is what descent at rate 1 has to take off it: `ema` says why. A batch
  of zeros, or an expert without rows, leaves it; one with a NaN makes it NaN.
  """
  range = jnp.where(range <= 0, top, range)
  return jnp.where(range <= 0, 1, range) / 127


def _backward(decay, saved, g):
  range, top = saved
  distance = jnp.where(range <= 0, -top, (1 - decay) * (range - top))
  return jnp.where(top <= 0, 0, distance), jnp.zeros_like(top)


followed.defvjp(lambda range, top, decay: (followed(range, top, decay), (range, top)), _backward)


@jax.custom_vjp
def fixed(x, step):
  """x [..., K] rounded to multiples of step [..., 1], -127 to 127; straight through within."""
  return reference.fake_quant_fixed(x, step)


fixed.defvjp(
    lambda x, step: (fixed(x, step), (x, step)),
    lambda saved, g: (jnp.where(jnp.abs(saved[0].astype(jnp.float32)) >= 127 * saved[1], 0, g),
                      jnp.zeros_like(saved[1])))


def has_averages(params):
  """Whether a weight's activations have ranges that are moving averages."""
  return any(isinstance(getattr(w, 'inputs', None), Average)
             for w in tree.named_weights(params).values())


@functools.lru_cache
def averaged(tx):
  """The optimizer `tx`, and for ranges of activations the step that makes them moving averages.

  They take no part in what `tx` does: clipping, moments, decay.
  """
  is_range = lambda x: isinstance(x, Average)
  labels = lambda params: jax.tree.map(
      lambda x: 'ranges' if is_range(x) else 'rest', params, is_leaf=is_range)
  return optax.partition(dict(ranges=optax.sgd(1.), rest=tx), labels)
