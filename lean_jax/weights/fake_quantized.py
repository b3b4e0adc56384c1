"""The weight of quantization-aware training: rounded forward, straight through backward."""
from typing import Any

from flax.core import meta

from lean_jax.kernels.fake_quant import api as fake_quant
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights.base import Weight, pytree, static
from lean_jax.weights.quantized import Quantized
from lean_jax.weights.trained import Trained


@pytree
class FakeQuantized(Trained):
  """The base as it will be once quantized to `spec`; its gradient is that of the float value.

  What is trained is what the integers compute: `unbox()` equals, bit for bit, `unbox()` of the
  `Quantized` made of the same base.
  """
  base: Weight
  spec: QuantSpec = static()
  inputs: Any = None                                   # the range of static activations

  def rounded_matrix(self, matrix):
    return fake_quant.fake_quant(matrix, self.spec)

  def quantized(self, spec):
    return Quantized.of(meta.unbox(self.base), spec, self.dims, self.axes,
                        input_scale=self.input_scale)
