"""The quantized weight as one platform's products read it, and the tree of them.

A weight is saved in one layout, packed bytes. `prepare` lays its codes out anew once, before a
program runs; it changes no value.
"""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.kernels.native import library
from lean_jax.quantization import formats, layouts
from lean_jax.weights import product
from lean_jax.weights.base import Weight, from_matrix, matrix_names, pytree, static
from lean_jax.weights.quantized import Quantized

PLATFORMS = dict(cpu='panels', tpu='int4', gpu='columns')


@pytree
class Prepared(Weight):
  """A Quantized weight with its codes in another layout, see `quantization.layouts`."""
  values: Any                                          # of `layout`, *E being [*n *e]
  rest: Quantized                                      # all of it but the values, which are None
  layout: str = static()
  dims = property(lambda self: self.rest.dims)
  axes = property(lambda self: self.rest.axes)

  @classmethod
  def of(cls, w, layout):
    """Of a Quantized weight.

    Raises:
      ValueError: there is no such layout, or its codes have no such layout.
    """
    values = (layouts.arranged(w.codes(), w.spec, layout) if layout == 'int4' else
              layouts.laid_out(w.values, w.spec, layout))
    return cls(values, dataclasses.replace(w, values=None), layout)

  def quantized(self):
    """The weight that it was made of."""
    packed = layouts.arranged(self.codes(), self.rest.spec, 'packed')
    return dataclasses.replace(self.rest, values=packed)

  def codes(self):
    """[*n *e I O], int8 or uint8, rows as they are stored."""
    return layouts.codes_of(self.values, self.rest.spec, self.rest.matrix_rows, self.layout)

  def matrix(self, dtype):
    """The dequantized weight, [*n *e I O], rows in the order of the inputs."""
    w = self.rest
    value = formats.dequantize(self.codes(), w.scale, w.zero, w.spec, dtype)
    if w.order is None:
      return value
    return jnp.take_along_axis(value, jnp.argsort(w.order, axis=-1)[..., None], axis=-2)

  def unbox(self):
    return from_matrix(self.matrix(jnp.dtype(self.rest.dtype)), self.dims, self.rest.sizes)

  def einsum(self, eqn, x):
    return product.product(eqn, x, self.rest, self.values, self.layout)

  def grouped(self, x, sizes):
    return product.grouped(x, sizes, self.rest, self.values, self.layout)

  def take(self, ids):
    w = self.rest
    if w.dims != 'oi' or w.order is not None:
      return super().take(ids)
    flat = ids.reshape(-1)
    columns = lambda a: a if a.shape[-1] == 1 else jnp.take(a, flat, axis=-1)
    wide = w.scale if hasattr(w.scale, 'dtype') else w.scale.astype(jnp.float32)
    few = dataclasses.replace(
        w, scale=columns(wide), zero=None if w.zero is None else columns(w.zero),
        sizes=(flat.shape[0], w.sizes[1]), spec=dataclasses.replace(w.spec, double=False))
    values = layouts.columns(self.values, flat, self.layout)
    layout = 'packed' if self.layout == 'panels' else self.layout
    rows = dataclasses.replace(self, values=values, rest=few, layout=layout).unbox()
    return rows.reshape(*ids.shape, -1)

  def names(self):
    *batch, i, o = matrix_names(self.dims, self.axes)
    values = dict(columns=(*batch, o, i), panels=(*batch, o, i, None)).get(self.layout,
                                                                          (*batch, i, o))
    return dataclasses.replace(self, values=values,
                               rest=dataclasses.replace(self.rest.names(), values=None))

  def _replace_axes(self, dims, axes):
    return dataclasses.replace(self, rest=self.rest._replace_axes(dims, axes))


def prepare(params, platform):
  """The tree with each Quantized weight, inside others too, laid out for a platform.

  Codes that a layout has no room for (nf4 and fp8 on a TPU, where XLA writes such a weight out once
  a use) stay packed; so does, for CPUs, what is no multiple of 64 columns, and everything where
  no kernel reads panels (`lean-jax info`). What is prepared already stays as it is.

  Args:
    params: a tree of weights and arrays.
    platform: 'tpu': integers; 'gpu': columns; 'cpu': panels.

  Raises:
    InputError: there is no such platform.
  """
  if platform not in PLATFORMS:
    raise InputError(f'no platform {platform!r}; there are: {", ".join(PLATFORMS)}')
  layout = PLATFORMS[platform]

  def one(w):
    if not isinstance(w, Quantized):
      return w
    if layout == 'panels' and not (library.takes_panels() and layouts.has_panels(
        w.spec, w.matrix_rows, w.values.shape[-1])):
      return w
    if layout == 'int4' and layouts.element(w.spec) is None:
      return w
    return Prepared.of(w, layout)
  return jax.tree.map(one, params, is_leaf=lambda w: isinstance(w, Quantized | Prepared))


def refuse_prepared(params):
  """Raises InputError where a tree that is to be saved has a Prepared weight."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda w: isinstance(w, Prepared))
  for path, w in leaves:
    if isinstance(w, Prepared):
      raise InputError(f'{jax.tree_util.keystr(path, simple=True, separator="/")} is laid out for '
                       f'one platform ({w.layout}); save the tree that `prepare` was given')
