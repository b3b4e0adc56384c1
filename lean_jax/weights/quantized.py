"""The weight stored in few bits: packed integers and their scales."""
import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from lean_jax.kernels.grouped_matmul import api as grouped_matmul
from lean_jax.kernels.int8_matmul import api as int8_matmul
from lean_jax.quantization import formats
from lean_jax.weights.base import (
  Weight,
  as_matmul,
  from_matrix,
  matrix_names,
  positions,
  pytree,
  static,
  to_matrix,
  unstacked,
)


@pytree
class Quantized(Weight):
  """(code - zero) * scale, the codes packed along the contraction axis.

  The arrays hold the weight as a matrix [*n *e I O] (see `to_matrix`), whatever its dense shape.
  """
  values: Any                                          # [*n *e I*bits/8 O], uint8; int8 if bits = 8
  scale: Any                                           # [*n *e G O], G groups along I
  zero: Any                                            # as scale, uint8; None if symmetric
  spec: formats.QuantSpec = static()
  sizes: tuple = static()                              # of the dense axes but the stacked ones
  dtype: str = static()                                # of the dense value
  dims: str = static()
  axes: tuple = static()

  @classmethod
  def of(cls, value, spec, dims, axes):
    """Quantizes a dense value by rounding to nearest."""
    sizes = unstacked(value.shape, dims)
    codes, scale, zero = formats.quantize(to_matrix(value, dims), spec)
    return cls(formats.pack(codes, spec.bits), scale, zero, spec, sizes, str(value.dtype), dims,
               axes)

  @property
  def matrix_rows(self):
    """The length I of the contraction axis."""
    return math.prod(self.sizes[k] for k in positions(self.dims.replace('n', ''), 'i'))

  def matrix(self, dtype):
    """The dequantized weight, [*n *e I O]."""
    return self._dequantized(self.values, self.scale, self.zero, dtype)

  def _dequantized(self, values, scale, zero, dtype):
    codes = formats.unpack(values, self.spec, self.matrix_rows)
    return formats.dequantize(codes, scale, zero, self.spec, dtype)

  def unbox(self):
    return from_matrix(self.matrix(jnp.dtype(self.dtype)), self.dims, self.sizes)

  def einsum(self, eqn, x):
    x2, restore = as_matmul(eqn, x, self.dims, self.sizes)
    if self.spec.activation_bits == 8:
      y = int8_matmul.int8_matmul(x2, self.values, self.scale)
    else:
      y = x2 @ self.matrix(x.dtype)
    return restore(y.astype(x.dtype))

  def grouped(self, x, sizes):
    if self.spec.activation_bits == 8:
      y = int8_matmul.int8_grouped_matmul(x, self.values, self.scale, sizes)
      return y.astype(x.dtype)
    stored = (self.values, self.scale, self.zero)
    return grouped_matmul.grouped_matmul(
        x, stored, sizes, matrix=lambda part: self._dequantized(*part, x.dtype))

  def names(self):
    *batch, i, o = matrix_names(self.dims, self.axes)
    full = (*batch, i, o)
    scale = full if self.spec.group else (*batch, None, o)
    return dataclasses.replace(self, values=full, scale=scale,
                               zero=None if self.zero is None else scale)
