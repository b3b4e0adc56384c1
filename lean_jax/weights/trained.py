"""What the weights that train through a rounding have in common."""
import dataclasses
from typing import Any

from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.kernels.fake_quant import api as fake_quant
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights.base import (
  Weight,
  Wrapper,
  as_matmul,
  from_matrix,
  matrix_names,
  to_matrix,
  unstacked,
)


class Trained(Wrapper):
  """A float weight, `base`, that computes as the integers which it will be.

  A kind says how the matrix is rounded (`rounded_matrix`) and stored (`quantized`). The activations
  are rounded here, if `spec` has them in 8 bits: row by row, or in the one range of `inputs`, whose
  kind says how it is learned (`quantization/pact.py`, `ema.py`).
  """
  base: Weight
  spec: QuantSpec
  inputs: Any

  def rounded_matrix(self, matrix):
    """The base's value as a matrix [*n *e I O], rounded; differentiable."""
    raise TypeError(f'{type(self).__name__} does not round')

  def quantized(self, spec):
    """The `Quantized` whose `unbox()` is this one's, bit for bit."""
    raise TypeError(f'{type(self).__name__} cannot be stored')

  def matrix(self):
    """The rounded value, [*n *e I O]."""
    return self.rounded_matrix(to_matrix(meta.unbox(self.base), self.dims))

  def unbox(self):
    value = meta.unbox(self.base)
    sizes = unstacked(value.shape, self.dims)
    return from_matrix(self.rounded_matrix(to_matrix(value, self.dims)), self.dims, sizes)

  def einsum(self, eqn, x):
    if self.spec.activation_bits is None:
      return super().einsum(eqn, x)
    w = self.unbox()
    x2, restore = as_matmul(eqn, x, self.dims, w.shape)
    x2 = fake_quant.fake_quant_rows(x2) if self.inputs is None else self.inputs.rounded(x2)
    return restore(x2 @ to_matrix(w, self.dims).astype(x.dtype))

  def grouped(self, x, sizes):
    if self.spec.activation_bits is not None:
      x = (fake_quant.fake_quant_rows(x) if self.inputs is None
           else self.inputs.rounded_rows(x, sizes))
    return super().grouped(x, sizes)

  @property
  def input_scale(self):
    """The step of static activations, [*n *e], or None."""
    return None if self.inputs is None else self.inputs.step

  def names(self):
    *batch, _, _ = matrix_names(self.dims, self.axes)
    return dataclasses.replace(
        self, base=self.base.names(),
        inputs=None if self.inputs is None else self.inputs.names(tuple(batch)))


def with_inputs(w, make):
  """A weight in training as w8a8, its activations now in one range: w8a8-static.

  Args:
    w: a FakeQuantized or a LearnedStep.
    make: the range of a shape [*n *e].

  Raises:
    InputError: another kind or scheme, or it has a range already.
  """
  if not isinstance(w, Trained):
    raise InputError(f'a {type(w).__name__} weight has no range of activations to learn; make it '
                     'one in training first: fake_quantize or lsq, w8a8')
  if w.spec.activation_bits != 8 or w.spec.bits != 8 or w.inputs is not None:
    raise InputError(f'the weight is trained as {w.spec}; a range of activations is learned for '
                     'w8a8, once')
  matrix = to_matrix(meta.unbox(w.base), w.dims)
  return dataclasses.replace(w, spec=dataclasses.replace(w.spec, static=True),
                             inputs=make(matrix.shape[:-2]))
