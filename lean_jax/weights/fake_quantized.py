"""The weight of quantization-aware training: rounded forward, straight through backward."""
import dataclasses

from flax.core import meta

from lean_jax.kernels.fake_quant import api as fake_quant
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights.base import (
  Weight,
  Wrapper,
  as_matmul,
  from_matrix,
  pytree,
  static,
  to_matrix,
  unstacked,
)


@pytree
class FakeQuantized(Wrapper):
  """The base as it will be once quantized to `spec`; its gradient is that of the float value.

  What is trained is what the integers compute: `unbox()` equals, bit for bit, `unbox()` of the
  `Quantized` made of the same base.
  """
  base: Weight
  spec: QuantSpec = static()

  def unbox(self):
    value = meta.unbox(self.base)
    sizes = unstacked(value.shape, self.dims)
    rounded = fake_quant.fake_quant(to_matrix(value, self.dims), self.spec)
    return from_matrix(rounded, self.dims, sizes)

  def einsum(self, eqn, x):
    if self.spec.activation_bits is None:
      return super().einsum(eqn, x)
    w = self.unbox()
    x2, restore = as_matmul(eqn, x, self.dims, w.shape)
    return restore(fake_quant.fake_quant_rows(x2) @ to_matrix(w, self.dims).astype(x.dtype))

  def grouped(self, x, sizes):
    if self.spec.activation_bits is not None:
      x = fake_quant.fake_quant_rows(x)
    return super().grouped(x, sizes)

  def names(self):
    return dataclasses.replace(self, base=self.base.names())
