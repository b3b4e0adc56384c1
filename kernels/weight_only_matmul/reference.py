"""The oracle of weight_only_matmul: the weight written out in float32, and multiplied with."""
import jax.numpy as jnp

from lean_jax.quantization import codes as grid
from lean_jax.quantization import formats
from lean_jax.quantization.packing import unpack


def matrix(values, scale, zero, spec, rows, dtype):
  """The weight [*E K N] that packed codes stand for, K = `rows`."""
  codes = grid.signed(unpack(values, spec.bits, rows), spec)
  return formats.dequantize(codes, scale, zero, spec, dtype)


def weight_only_matmul(x, values, scale, zero, spec):
  """See api.weight_only_matmul."""
  w = matrix(values, scale, zero, spec, x.shape[-1], jnp.float32)
  return jnp.matmul(x.astype(jnp.float32), w, precision='highest').astype(x.dtype)
