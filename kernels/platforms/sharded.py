"""Products with sharded weights, each device multiplying its own part, inside `jax.shard_map`.

The compiler cannot cut a kernel up, and of a quantized weight it may gather the dequantized one.
Here a part is the operand of an op of its own: rows of the weight on different devices end in a
sum over them, columns in parts of the result, and what is spread for memory alone (fsdp) is
gathered just before the product, as the packed bytes that it is.
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.quantize_rows import reference as rows
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.quantization import layouts
from lean_jax.quantization.codes import magnitude
from lean_jax.quantization.packing import unit


class Axes(NamedTuple):
  """Which axes of a mesh shard the axes of a product [M K] @ [K N]; None, a name, or several.

  Attributes:
    M: rows of x, and of the result.
    K: what is summed over, in x and in the weight: each device multiplies its own rows of the
      weight, and the products are added.
    N: columns of the weight, and of the result.
    fsdp: rows of the weight, besides; they are gathered before the product, and gradients of
      scales are scattered after it. It may also be one of M's.
    fsdp_columns: the same of columns of the weight.
  """
  M: str | tuple | None = None
  K: str | tuple | None = None
  N: str | tuple | None = None
  fsdp: str | tuple | None = None
  fsdp_columns: str | tuple | None = None


def int8_matmul(x, values, scale, mesh, axes, *, group=None, x_scale=None, layout='packed',
                dtype=jnp.float32, implementation=None):
  """`int8_matmul` of x [M K] and values [K N], sharded as `axes` says.

  Where rows of x are in parts they are rounded to the step of the whole row, the greatest of those
  of its parts, so that the integers are those of the unsharded product; over devices, their float32
  products with the scales are added.

  Args:
    x, values, scale, group, x_scale, layout, dtype, implementation: as of `int8_matmul.api`;
      x_scale is of no axes.
    mesh: a jax.sharding.Mesh.
    axes: Axes.

  Returns:
    [M N], in dtype.

  Raises:
    ValueError: an axis does not divide by its devices, a group of rows is cut, or an axis of the
      mesh shards two axes.
  """
  if x.ndim != 2:
    raise ValueError(f'x {x.shape}; expected [M K]')
  bits = 4 if values.dtype == jnp.uint8 else 8
  _check(x, values, scale, mesh, axes, group, bits, layout)
  how, of = dict(group=group, layout=layout, implementation=implementation), scale.shape

  def local(x, values, scale, *step):
    values, scale = _all_values(values, axes, layout), _all_scales(scale, axes, of)
    given = step[0] if step else None
    if not axes.K:
      return int8.int8_matmul(x, values, scale, x_scale=given, dtype=dtype, **how)
    step = _agreed(x, axes.K) if given is None else lax.stop_gradient(given)
    # The op takes one step for all rows: they are put on their grids first, and it is 1.
    codes = _straight(x, jnp.broadcast_to(step, (len(x), 1)))
    y = int8.int8_matmul(codes, values, scale, x_scale=jnp.ones(()), **how)
    return (lax.psum(y, axes.K) * step).astype(dtype)

  given = () if x_scale is None else (x_scale.reshape(()),)
  return _mapped(local, mesh, axes, layout, scale, [PartitionSpec()] * len(given))(
      x, values, scale, *given)


def weight_only_matmul(x, values, scale, zero, spec, mesh, axes, *, layout='packed',
                       implementation=None):
  """`weight_only_matmul` of x [M K] and values [K*bits/8 N], sharded as `axes` says.

  Args:
    x, values, scale, zero, spec, layout, implementation: as of `weight_only_matmul.api`, but scale
      is an array.
    mesh: a jax.sharding.Mesh.
    axes: Axes.

  Returns:
    [M N], in x's dtype; each device's product is in it too, their sum in float32.

  Raises:
    ValueError: as of `int8_matmul`; or scales are themselves in codes.
  """
  if x.ndim != 2 or not hasattr(scale, 'dtype'):
    raise ValueError(f'x {x.shape} and scales of {type(scale).__name__}; expected [M K] and an '
                     'array')
  _check(x, values, scale, mesh, axes, spec.group, spec.bits, layout)
  of = scale.shape

  def local(x, values, scale, *zero):
    values, scale = _all_values(values, axes, layout), _all_scales(scale, axes, of)
    zero = _all_scales(zero[0], axes, of) if zero else None
    y = weight_only.weight_only_matmul(x, values, scale, zero, spec, layout=layout,
                                       implementation=implementation)
    return lax.psum(y.astype(jnp.float32), axes.K).astype(x.dtype) if axes.K else y

  given = () if zero is None else (zero,)
  return _mapped(local, mesh, axes, layout, scale, [_of_scale(axes, scale)] * len(given))(
      x, values, scale, *given)


def units(group, bits, layout):
  """(rows, columns) of a weight that are not cut: those that share bytes, scales or a piece."""
  each = dict(int4=1, panels=32 // bits).get(layout) or unit(bits)[0]
  return math.lcm(group or 1, each), layouts.PANEL if layout == 'panels' else 1


def divides(length, ways, of):
  """Whether a length falls into as many parts of whole units."""
  return ways == 1 or length % (ways * of) == 0


def _mapped(local, mesh, axes, layout, scale, more):
  values = PartitionSpec(*_turned((_rows(axes), _columns(axes)), layout))
  where = (PartitionSpec(axes.M, axes.K), values, _of_scale(axes, scale), *more)
  return jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=PartitionSpec(axes.M, axes.N),
                       check_vma=False)


def _rows(axes):
  return (*_names(axes.K), *_names(axes.fsdp)) or None


def _columns(axes):
  return (*_names(axes.N), *_names(axes.fsdp_columns)) or None


def _of_scale(axes, scale):
  """The PartitionSpec of scales [G N]; one for all rows, or for all columns, is on all devices."""
  G, N = scale.shape
  return PartitionSpec(_rows(axes) if G > 1 else None, _columns(axes) if N > 1 else None)


def _turned(pair, layout):
  return pair[::-1] if layout in ('columns', 'panels') else pair


def _all_values(values, axes, layout):
  """A device's own values with those that are spread for memory alone."""
  rows, columns = _turned((0, 1), layout)
  return _all(_all(values, axes.fsdp, rows), axes.fsdp_columns, columns)


def _all_scales(scale, axes, shape):
  """The same of scales; `shape` is that of all devices'."""
  scale = _all(scale, axes.fsdp, 0) if shape[0] > 1 else scale
  return _all(scale, axes.fsdp_columns, 1) if shape[1] > 1 else scale


def _all(a, axis, dimension):
  """What the devices along an axis hold, in order."""
  return lax.all_gather(a, axis, axis=dimension, tiled=True) if axis else a


@jax.custom_vjp
def _straight(x, step):
  """x on the grid of its step, as floats; the gradient is that of x / step."""
  return rows.encoded(x.astype(jnp.float32), step)


_straight.defvjp(lambda x, step: (_straight(x, step), (x, step)),
                 lambda saved, g: ((g / saved[1]).astype(saved[0].dtype),
                                   jnp.zeros_like(saved[1])))


def _agreed(x, axis):
  """The steps [M 1] of rows of which each device along an axis holds a part."""
  top = magnitude(lax.stop_gradient(x).astype(jnp.float32), -1, keepdims=True)
  bits = lax.pmax(lax.bitcast_convert_type(top, jnp.int32), axis)         # keeps a NaN
  return rows.step_of(lax.bitcast_convert_type(bits, jnp.float32))


def _names(axis):
  return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _check(x, values, scale, mesh, axes, group, bits, layout):
  """Raises ValueError where parts would not be operands."""
  within = [n for a in (axes.K, axes.N, axes.fsdp, axes.fsdp_columns) for n in _names(a)]
  apart = [n for a in (axes.M, axes.K, axes.N) for n in _names(a)]
  for names in (within, apart):
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
      raise ValueError(f'mesh axis {twice!r} is given twice in {axes}; give each to one axis')
  unknown = [n for n in within + apart if n not in mesh.shape]
  if unknown:
    raise ValueError(f'no mesh axis {unknown[0]!r}; there are: {", ".join(mesh.shape)}')
  (M, K), N = x.shape, layouts.columns_of(values.shape, layout)
  of_rows, of_columns = units(group if scale.shape[0] > 1 else None, bits, layout)
  count = lambda *parts: math.prod(mesh.shape[n] for a in parts for n in _names(a))
  for name, length, ways, of in (('M', M, count(axes.M), 1), ('K', K, count(axes.K), 1),
                                 ('N', N, count(axes.N, axes.fsdp_columns), of_columns)):
    if not divides(length, ways, of):
      raise ValueError(f'{name} = {length} does not divide over {ways} devices; shard another axis')
  ways = count(axes.K, axes.fsdp)
  if not divides(K, ways, of_rows):
    raise ValueError(f'{K} rows over {ways} devices cut groups of {of_rows}; expected a multiple '
                     f'of {of_rows * ways} rows')
