"""The oracle of fake_quant: in, and out again."""
import jax.numpy as jnp

from lean_jax.kernels.quantize_rows.reference import quantize_rows
from lean_jax.quantization import formats


def fake_quant(w, spec):
  """w [..., I, O] after a round trip through the format `spec`, in its own dtype."""
  codes, scale, zero = formats.quantize(w, spec)
  return formats.dequantize(codes, scale, zero, spec, w.dtype)


def fake_quant_rows(x):
  """x [... M K] after a round trip through 8 bits, one range a row."""
  codes, scale = quantize_rows(x)
  return (codes.astype(jnp.float32) * scale).astype(x.dtype)


def fake_quant_fixed(x, step):
  """x [..., K] after a round trip through 8 bits; step: of a rank, [..., 1], float32."""
  codes = jnp.clip(jnp.round(x.astype(jnp.float32) / step), -127, 127)
  return (codes * step).astype(x.dtype)
