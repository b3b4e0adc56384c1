"""The oracle of weight_only_matmul: the weight written out in float32, and multiplied with."""
import jax.numpy as jnp

from lean_jax.quantization import formats, layouts


def matrix(values, scale, zero, spec, rows, dtype, layout='packed'):
  """The weight [*E K N] that codes in a layout stand for, K = `rows`."""
  codes = layouts.codes_of(values, spec, rows, layout)
  return formats.dequantize(codes, scale, zero, spec, dtype)


def weight_only_matmul(x, values, scale, zero, spec, layout='packed'):
  """See api.weight_only_matmul."""
  w = matrix(values, scale, zero, spec, x.shape[-1], jnp.float32, layout)
  return jnp.matmul(x.astype(jnp.float32), w, precision='highest').astype(x.dtype)
