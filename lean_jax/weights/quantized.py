"""The weight stored in few bits: packed codes and their scales."""
import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from lean_jax.quantization import codes as grid
from lean_jax.quantization import formats
from lean_jax.quantization.nested import Nested
from lean_jax.quantization.packing import pack, unpack
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights import product
from lean_jax.weights.base import (
  Weight,
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
  """What codes stand for, the codes packed along the contraction axis.

  The arrays hold the weight as a matrix [*n *e I O] (see `to_matrix`), whatever its dense shape.
  """
  values: Any                                          # [*n *e I*bits/8 O], uint8; int8 if w8
  scale: Any                                           # [*n *e G O], G groups along I; or Nested
  zero: Any                                            # as scale; None if symmetric
  order: Any                                           # [*n *e I]: which input a row is of, or None
  input_scale: Any                                     # [*n *e], of static activations, or None
  spec: QuantSpec = static()
  sizes: tuple = static()                              # of the dense axes but the stacked ones
  dtype: str = static()                                # of the dense value
  dims: str = static()
  axes: tuple = static()

  @classmethod
  def of(cls, value, spec, dims, axes, shrink=1., input_scale=None):
    """Quantizes a dense value by rounding to nearest; `shrink` as of `formats.quantize`."""
    found = formats.quantize(to_matrix(value, dims), spec, shrink)
    return cls.from_codes(*found, spec, unstacked(value.shape, dims), value.dtype, dims, axes,
                          input_scale=input_scale)

  @classmethod
  def from_codes(cls, codes, scale, zero, spec, sizes, dtype, dims, axes, *, order=None,
                 input_scale=None):
    """Of codes [*n *e I O] as `formats.quantize` gives them, rows in `order`."""
    return cls(pack(codes, spec.bits), scale, zero, order, input_scale, spec, tuple(sizes),
               str(jnp.dtype(dtype)), dims, tuple(axes))

  @property
  def matrix_rows(self):
    """The length I of the contraction axis."""
    return math.prod(self.sizes[k] for k in positions(self.dims.replace('n', ''), 'i'))

  def codes(self):
    """[*n *e I O], int8 or uint8, rows as they are stored."""
    return grid.signed(unpack(self.values, self.spec.bits, self.matrix_rows), self.spec)

  def matrix(self, dtype):
    """The dequantized weight, [*n *e I O], rows in the order of the inputs."""
    value = self._stored_matrix(dtype)
    if self.order is None:
      return value
    return jnp.take_along_axis(value, jnp.argsort(self.order, axis=-1)[..., None], axis=-2)

  def _stored_matrix(self, dtype):
    return formats.dequantize(self.codes(), self.scale, self.zero, self.spec, dtype)

  def unbox(self):
    return from_matrix(self.matrix(jnp.dtype(self.dtype)), self.dims, self.sizes)

  def einsum(self, eqn, x):
    return product.product(eqn, x, self, self.values, 'packed')

  def grouped(self, x, sizes):
    return product.grouped(x, sizes, self, self.values, 'packed')

  def take(self, ids):
    if self.dims != 'oi' or self.order is not None:
      return super().take(ids)
    pick = lambda a: jnp.take(a, ids.reshape(-1), axis=-1)
    wide = self.scale if hasattr(self.scale, 'dtype') else self.scale.astype(jnp.float32)
    scale = wide if self.spec.tensor else pick(wide)
    zero = None if self.zero is None else pick(self.zero)
    codes = grid.signed(unpack(pick(self.values), self.spec.bits, self.matrix_rows), self.spec)
    rows = formats.dequantize(codes, scale, zero, self.spec, jnp.dtype(self.dtype))
    return rows.T.reshape(*ids.shape, -1)

  def names(self):
    *batch, i, o = matrix_names(self.dims, self.axes)
    scale = (*batch, i if self.spec.group else None, None if self.spec.tensor else o)
    return dataclasses.replace(
        self, values=(*batch, i, o),
        scale=self.scale.names(scale) if isinstance(self.scale, Nested) else scale,
        zero=None if self.zero is None else scale,
        order=None if self.order is None else (*batch, i),
        input_scale=None if self.input_scale is None else tuple(batch))
