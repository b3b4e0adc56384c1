"""The weight of LSQ: the step of its grid is learned beside it."""
import dataclasses
from typing import Any

from flax.core import meta

from lean_jax.kernels.fake_quant import api as fake_quant
from lean_jax.kernels.fake_quant import learned
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights.base import Weight, matrix_names, pytree, static, to_matrix, unstacked
from lean_jax.weights.quantized import Quantized
from lean_jax.weights.trained import Trained


@pytree
class LearnedStep(Trained):
  """The base rounded to a grid whose step, and offset if it has one, are trained with it.

  Esser et al. 2020 (arXiv:1902.08153), section 2; the offset is that of Bhalgat et al. 2020
  (arXiv:2004.09576), section 3.1. `unbox()` is, bit for bit, that of the `Quantized` made of it.
  """
  base: Weight
  scale: Any                                           # [*n *e G O], or [*n *e 1 1]; float32
  offset: Any                                          # as scale; None if symmetric
  spec: QuantSpec = static()
  inputs: Any = None                                   # the range of static activations

  def rounded_matrix(self, matrix):
    return fake_quant.learned_step(matrix, self.scale, self.offset, self.spec)

  def quantized(self, spec):
    value = meta.unbox(self.base)
    found = learned.stored(to_matrix(value, self.dims), self.scale, self.offset, self.spec)
    return Quantized.from_codes(*found, spec, unstacked(value.shape, self.dims), value.dtype,
                                self.dims, self.axes, input_scale=self.input_scale)

  def names(self):
    *batch, i, o = matrix_names(self.dims, self.axes)
    scale = (*batch, i if self.spec.group else None, None if self.spec.tensor else o)
    return dataclasses.replace(super().names(), scale=scale,
                               offset=None if self.offset is None else scale)
