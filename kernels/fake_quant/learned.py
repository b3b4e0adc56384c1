"""Rounding whose step is learned: LSQ (arXiv:1902.08153), with an offset LSQ+ (arXiv:2004.09576).

Symbols of the papers: v a weight, s its step, beta its offset, n and p the least and the greatest
code (-Q_N and Q_P), N the number of weights that share a step.
"""
import math

import jax
import jax.numpy as jnp

from lean_jax.quantization import codes as grid
from lean_jax.quantization import formats


def rounded(v, step, offset, *, spec):
  """What the codes of `encode` stand for, in v's dtype; a NaN stays one."""
  codes, scale, zero = encode(v, step, offset, spec)
  return jnp.where(jnp.isnan(v), jnp.nan, formats.dequantize(codes, scale, zero, spec, v.dtype))


def gradients(v, step, offset, g, spec):
  """Those of v, step and offset, of the gradient g of `rounded`.

  With u = (v - beta) / s (LSQ, equation 3; LSQ+, equations 5 and 6):

    d/dv     1 where n < u < p, else 0
    d/ds     round(u) - u where n < u < p, else n or p
    d/dbeta  0 where n < u < p, else 1

  the last two times 1 / sqrt(N p) (LSQ, section 2.2). Through the rounding of the step and of the
  offset as they are stored the gradient passes straight.
  """
  _, scale, zero = encode(v, step, offset, spec)
  up = formats.grouped(g.astype(jnp.float32), spec)                      # [..., G, g, O]
  u = formats.grouped(v.astype(jnp.float32), spec) / scale[..., None, :].astype(jnp.float32)
  if zero is not None:
    u = u + zero[..., None, :].astype(jnp.float32)
  inside = (spec.low < u) & (u < spec.high)
  share = 1 / jnp.sqrt(sharing(v.shape, spec) * spec.high)
  share = share.reshape((1,) * (v.ndim - 2) + share.shape)
  slope = jnp.where(inside, jnp.round(u) - u, jnp.clip(u, spec.low, spec.high))
  within = jnp.where(inside, up, 0)
  dstep = per_step(up * slope, spec) * share
  doffset = None if offset is None else per_step(up - within, spec) * share
  if spec.group:
    # XLA makes one loop over v and g of the sums and of an array of the shape that they are over:
    # the array keeps that shape, and the sums take what it is made of.
    within = jax.lax.optimization_barrier(within)
  return (formats.ungrouped(within, v.shape[-2]).astype(v.dtype), dstep.astype(step.dtype),
          None if offset is None else doffset.astype(offset.dtype))


def encode(v, step, offset, spec):
  """codes, scale, zero of v as `formats.quantize` gives them, on the learned grid.

  A step that training has brought to 0 or below counts as the least positive number.
  """
  dtype = grid.stored_dtype(spec)
  scale = jnp.maximum(step.astype(dtype), jnp.finfo(dtype).tiny)
  zero = None
  if offset is not None:
    place = jnp.round(-offset / scale.astype(jnp.float32))
    zero = jnp.clip(place, spec.low, spec.high).astype(jnp.uint8)
  split = formats.grouped(v.astype(jnp.float32), spec)
  codes = grid.encode(split, scale[..., None, :], None if zero is None else zero[..., None, :],
                      spec)
  return formats.ungrouped(codes, v.shape[-2]), scale, zero


def stored(v, step, offset, spec):
  """codes, scale, zero of `encode`, the scale NaN where a weight that it serves is one."""
  codes, scale, zero = encode(v, step, offset, spec)
  total = per_step(jnp.abs(formats.grouped(v.astype(jnp.float32), spec)), spec)
  return codes, jnp.where(jnp.isnan(total), jnp.nan, scale), zero


def sharing(shape, spec):
  """[G 1], or [1 1]: how many weights of a matrix [..., I, O] share each step."""
  I, O = shape[-2:]
  if spec.tensor:
    return jnp.full((1, 1), I * O, jnp.float32)
  group = spec.group or I
  return jnp.minimum(I - jnp.arange(0, I, group), group)[:, None].astype(jnp.float32)


def per_step(x, spec):
  """Sums of [..., G, g, O] over the weights that share a step."""
  # On CPUs the XLA of JAX 0.10 sums over I of [1 I O] five times slower than over that of [I O].
  x = (jnp.sum(x, axis=-2) if x.shape[-3] > 1 else
       jnp.sum(jnp.squeeze(x, -3), axis=-2, keepdims=True))
  return jnp.sum(x, axis=(-2, -1), keepdims=True) if spec.tensor else x


def mean_magnitude(v, spec):
  """<|v|> over the weights that share a step, as [..., G, O] or [..., 1, 1]."""
  total = per_step(jnp.abs(formats.grouped(v.astype(jnp.float32), spec)), spec)
  count = sharing(v.shape, spec)
  return total / count.reshape((1,) * (v.ndim - 2) + count.shape)


def lsq_start(v, spec):
  """2 <|v|> / sqrt(Q_P) (LSQ, section 2.1)."""
  return 2 / math.sqrt(spec.high) * mean_magnitude(v, spec)
