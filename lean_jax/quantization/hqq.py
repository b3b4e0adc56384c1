"""HQQ: zero points found by half-quadratic splitting, without looking at any input.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": the error of
the weights is measured by an l_p norm with p < 1, which a few outliers cannot rule. Alternately the
error is shrunk, by the norm's proximal operator, and the zero point set to what is then best.
"""
import functools

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.quantization import codes as grid
from lean_jax.quantization import formats
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Quantized
from lean_jax.weights.base import to_matrix, unstacked
from lean_jax.weights.dense import check_dense

P, BETA, GROWTH, STEPS = .7, 10., 1.01, 20             # the authors' own


def hqq(w, spec):
  """The weight in the format `spec`, an asymmetric one of integers; its zero points are floats.

  Raises:
    InputError: the weight is no float one, or the scheme is another.
  """
  spec = parse_spec(spec)
  check_dense(w, f'rounded to {spec} by hqq')
  if spec.symmetric or spec.tensor:
    raise InputError(f'hqq moves zero points, and {spec} has none of a group; give a scheme like '
                     'w4a16-g64-asym')
  value = meta.unbox(w)
  codes, scale, zero = hqq_codes(to_matrix(value, w.dims).astype(jnp.float32), spec)
  return Quantized.from_codes(codes, scale, zero, spec, unstacked(value.shape, w.dims), value.dtype,
                              w.dims, w.axes)


@functools.partial(jax.jit, static_argnums=1)
def hqq_codes(matrix, spec):
  """codes [..., I, O], scale and zero [..., G, O], both float32, of matrices [..., I, O]."""
  split = formats.grouped(matrix, spec)                                  # [..., G, g, O]
  scale, zero = grid.fit(split, spec, matrix.shape[-2])
  wide = scale.astype(jnp.float32)[..., None, :]
  inside = formats.grouped(jnp.ones_like(matrix), spec)                  # 0 after the last row
  mean = lambda x: jnp.sum(x * inside, axis=-2) / jnp.sum(inside, axis=-2)

  def step(state, beta):
    zero, best, least = state
    codes = grid.encode(split, scale[..., None, :], zero[..., None, :], spec).astype(jnp.float32)
    off = split - (codes - zero[..., None, :]) * wide
    found = mean(jnp.abs(off))
    best = jnp.where(found < least, zero, best)
    shrunk = jnp.sign(off) * jnp.maximum(
        jnp.abs(off) - jnp.maximum(jnp.abs(off), 1e-9) ** (P - 1) / beta, 0)
    return (mean(codes - (split - shrunk) / wide), best, jnp.minimum(found, least)), None
  zero = zero.astype(jnp.float32)
  betas = BETA * GROWTH ** jnp.arange(STEPS, dtype=jnp.float32)
  (_, zero, _), _ = jax.lax.scan(step, (zero, zero, jnp.full_like(zero, jnp.inf)), betas)
  codes = grid.encode(split, scale[..., None, :], zero[..., None, :], spec)
  return formats.ungrouped(codes, matrix.shape[-2]), scale, zero
