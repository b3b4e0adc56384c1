"""The product of a weight in codes, on one device or on each of a mesh.

Of arrays of floats the compiler knows how to cut up what it multiplies. A kernel it cannot cut up,
and codes it may widen before it moves them: so on a mesh these products are those of
`kernels.platforms.sharded`, by the same rules for logical axes that say where each array lives.
"""
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType

from lean_jax.kernels.grouped_matmul import api as grouped_matmul
from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.platforms import choice, sharded
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.quantization import codes as grid
from lean_jax.quantization import layouts
from lean_jax.weights.base import as_matmul, matrix_names


def product(eqn, x, w, values, layout, implementation=None):
  """`einsum` of a Quantized weight.

  Args:
    eqn, x: as of `Weight.einsum`.
    w: the weight; of its values only `values` is read.
    values, layout: its codes, and how they lie: see `quantization.layouts`.
    implementation: of the op; None is the fastest.
  """
  x2, restore = as_matmul(eqn, x, w.dims, w.sizes)
  if w.order is not None:
    x2 = jnp.take_along_axis(x2, w.order[..., None, :], axis=-1)
  spec, scale = w.spec, w.scale
  if spec.activation_bits == 8:
    values, layout = _integers(w, values, layout)
    runs, given = (int8.int8_matmul, sharded.int8_matmul), (x2, values, scale)
    how = dict(group=spec.group, x_scale=w.input_scale, layout=layout, dtype=x.dtype)
  else:
    runs = weight_only.weight_only_matmul, sharded.weight_only_matmul
    given, how = (x2, values, scale, w.zero, spec), dict(layout=layout)
  how['implementation'] = implementation
  where = axes(eqn, x, w, values, layout)
  run = runs[where is not None]
  if where is not None:
    if not hasattr(scale, 'dtype'):                       # scales in codes have axes of their own
      given = (x2, values, scale.astype(jnp.float32), *given[3:])
    how |= dict(mesh=jax.sharding.get_abstract_mesh(), axes=where)
  return restore(run(*given, **how).astype(x.dtype))


def grouped(x, sizes, w, values, layout):
  """`Weight.grouped` of a Quantized weight; `w`, `values` and `layout` as of `product`."""
  if w.order is not None:
    of_row = jnp.repeat(w.order, sizes, axis=0, total_repeat_length=x.shape[0])
    x = jnp.take_along_axis(x, of_row, axis=-1)
  if w.spec.activation_bits == 8:
    values, layout = _integers(w, values, layout)
    return int8.int8_grouped_matmul(x, values, w.scale, sizes, group=w.spec.group, layout=layout,
                                    x_scale=w.input_scale, dtype=x.dtype)
  return grouped_matmul.grouped_weight_only(x, values, w.scale, w.zero, w.spec, sizes,
                                            layout=layout)


def _integers(w, values, layout):
  """(values, layout) as `int8_matmul` takes them: a byte a code, or bytes of two rows."""
  bits = w.spec.bits
  taken = dict(packed=bits == 4, int4=True, columns=bits == 8,
               panels=bits == 8 or (bits == 4 and w.spec.code == 'int'))
  if taken[layout]:
    return values, layout
  codes = layouts.codes_of(values, w.spec, w.matrix_rows, layout)
  return grid.integers(codes, w.spec), 'packed'


def axes(eqn, x, w, values, layout):
  """The sharded.Axes of a weight's product, by the rules for logical axes that are set; or None.

  Rows of x are where 'batch' is, if they divide. What spreads a weight's axis multiplies there too,
  unless rows of x are spread by it: then it saves memory alone, and is gathered. An axis that does
  not divide is whole. None is without a mesh or without rules, inside of `jax.shard_map`, and of
  several matrices at once.
  """
  mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
  if (not rules or not choice.partitioned() or set(w.dims) != set('io')
      or any(kind != AxisType.Auto for kind in mesh.axis_types)):
    return None
  ways = lambda names: math.prod(mesh.shape[n] for n in names)

  def of(name):
    found = rules.get(name) or ()
    found = (found,) if isinstance(found, str) else found
    return tuple(n for n in found if mesh.shape.get(n, 1) > 1)
  xs = eqn.split(',')[0]
  first = next(k for k, c in enumerate(xs) if c not in _summed(eqn))
  M = of('batch')
  M = M if x.shape[first] % ways(M) == 0 else ()
  inputs, outputs = map(of, matrix_names(w.dims, w.axes)[-2:])
  group = w.spec.group if w.scale.shape[-2] > 1 else None
  bits = 8 if values.dtype == jnp.int8 else w.spec.bits
  of_rows, of_columns = sharded.units(group, bits, layout)
  if not sharded.divides(w.matrix_rows, ways(inputs), of_rows):
    inputs = ()
  columns = layouts.columns_of(values.shape, layout)
  if set(outputs) & set(inputs) or not sharded.divides(columns, ways(outputs), of_columns):
    outputs = ()
  there = lambda names, gathered: tuple(n for n in names if (n in M) == gathered) or None
  return sharded.Axes(M or None, there(inputs, False), there(outputs, False), there(inputs, True),
                      there(outputs, True))


def _summed(eqn):
  xs, rest = eqn.split(',')
  return set(xs) - set(rest.split('->')[1])
