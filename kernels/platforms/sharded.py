"""Products with sharded weights, each device multiplying its own part, inside `jax.shard_map`.

The compiler cannot cut a kernel up, and of a quantized weight it may gather the dequantized one.
Here a part is the operand of an op of its own: rows of the weight on different devices end in a
sum over them, columns in parts of the result, and what is spread for memory alone (fsdp) is
gathered just before the product, as the packed bytes that it is.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.quantize_rows import reference as rows
from lean_jax.kernels.weight_only_matmul import api as weight_only
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
  """
  M: str | tuple | None = None
  K: str | tuple | None = None
  N: str | tuple | None = None
  fsdp: str | tuple | None = None


def int8_matmul(x, values, scale, mesh, axes, *, group=None, x_scale=None, implementation=None):
  """`int8_matmul` of x [M K] and values [K N], sharded as `axes` says.

  Rows of x are rounded to the step of the whole row, the greatest of those of its parts, so that
  the integers are those of the unsharded product; over devices, their float32 products with the
  scales are added.

  Args:
    x, values, scale, group, x_scale, implementation: as of `int8_matmul.api`; x_scale is of no
      axes.
    mesh: a jax.sharding.Mesh.
    axes: Axes.

  Returns:
    [M N], float32.

  Raises:
    ValueError: an axis does not divide by its devices, a group of rows is cut, or an axis of the
      mesh shards two axes.
  """
  if values.ndim != 2:
    raise ValueError(f'values {values.shape}; expected [K N]')
  _check(x, values, scale, mesh, axes, group, 1, 1)
  G = 1 if group is None else scale.shape[0]

  def local(x, values, scale, *step):
    values, scale = _gathered(values, scale, axes, G > 1)
    step = lax.stop_gradient(step[0]) if step else _agreed(x, axes.K)
    # The op takes one step for all rows: they are put on their grids first, and it is 1.
    codes = _straight(x, jnp.broadcast_to(step, (len(x), 1)))
    y = int8.int8_matmul(codes, values, scale, group=group, x_scale=jnp.ones(()),
                         implementation=implementation)
    return _summed(y, axes.K) * step

  where = _places(axes, scale, G > 1)
  given = () if x_scale is None else (x_scale.reshape(()),)
  return _mapped(local, mesh, (*where, *[PartitionSpec()] * len(given)),
                 PartitionSpec(axes.M, axes.N))(x, values, scale, *given)


def weight_only_matmul(x, values, scale, zero, spec, mesh, axes, *, implementation=None):
  """`weight_only_matmul` of x [M K] and values [K*bits/8 N], sharded as `axes` says.

  Args:
    x, values, scale, zero, spec, implementation: as of `weight_only_matmul.api`, but scale is an
      array.
    mesh: a jax.sharding.Mesh.
    axes: Axes.

  Returns:
    [M N], in x's dtype; sums over devices in float32.

  Raises:
    ValueError: as of `int8_matmul`; or scales are themselves in codes.
  """
  if values.ndim != 2 or not hasattr(scale, 'dtype'):
    raise ValueError(f'values {values.shape} with scales of {type(scale).__name__}; expected '
                     '[K*bits/8 N] and an array')
  each, size = unit(spec.bits)
  _check(x, values, scale, mesh, axes, spec.group, each, size)
  split = bool(spec.group) and scale.shape[0] > 1

  def local(x, values, scale, *zero):
    values, scale = _gathered(values, scale, axes, split)
    zero = _all(zero[0], axes.fsdp if split else None) if zero else None
    wide = x.astype(jnp.float32) if axes.K else x
    y = weight_only.weight_only_matmul(wide, values, scale, zero, spec,
                                       implementation=implementation)
    return _summed(y, axes.K).astype(x.dtype)

  where = _places(axes, scale, split)
  given = () if zero is None else (zero,)
  return _mapped(local, mesh, (*where, *where[2:] * len(given)),
                 PartitionSpec(axes.M, axes.N))(x, values, scale, *given)


def _mapped(local, mesh, where, out):
  return jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=out, check_vma=False)


def _places(axes, scale, split):
  """PartitionSpecs of x, values and scale."""
  rows = (*_names(axes.K), *_names(axes.fsdp)) or None
  columns = axes.N if scale.shape[-1] > 1 else None
  return (PartitionSpec(axes.M, axes.K), PartitionSpec(rows, axes.N),
          PartitionSpec(rows if split else None, columns))


def _gathered(values, scale, axes, split):
  return _all(values, axes.fsdp), _all(scale, axes.fsdp if split else None)


def _all(a, axis):
  """The rows that the devices along an axis hold, in order."""
  return lax.all_gather(a, axis, axis=0, tiled=True) if axis else a


@jax.custom_vjp
def _straight(x, step):
  """x on the grid of its step, as floats; the gradient is that of x / step."""
  return rows.encoded(x.astype(jnp.float32), step)


_straight.defvjp(lambda x, step: (_straight(x, step), (x, step)),
                 lambda saved, g: ((g / saved[1]).astype(saved[0].dtype),
                                   jnp.zeros_like(saved[1])))


def _agreed(x, axis):
  """The steps [M 1] of rows of which each device along an axis holds a part."""
  top = rows.greatest(lax.stop_gradient(x).astype(jnp.float32))
  if axis:
    bits = lax.pmax(lax.bitcast_convert_type(top, jnp.int32), axis)       # keeps a NaN
    top = lax.bitcast_convert_type(bits, jnp.float32)
  return rows.step_of(top)


def _summed(y, axis):
  return lax.psum(y, axis) if axis else y


def _names(axis):
  return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def _check(x, values, scale, mesh, axes, group, each, size):
  """Raises ValueError where parts would not be operands; `each` codes are `size` rows of values."""
  within = [n for a in (axes.K, axes.N, axes.fsdp) for n in _names(a)]
  apart = [n for a in (axes.M, axes.K, axes.N) for n in _names(a)]
  for names in (within, apart):
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
      raise ValueError(f'mesh axis {twice!r} is given twice in {axes}; give each to one axis')
  unknown = [n for n in within + apart if n not in mesh.shape]
  if unknown:
    raise ValueError(f'no mesh axis {unknown[0]!r}; there are: {", ".join(mesh.shape)}')
  count = lambda *parts: _devices(mesh, [n for a in parts for n in _names(a)])
  (M, K), N = x.shape, values.shape[1]
  for name, length, ways in (('M', M, count(axes.M)), ('K', K, count(axes.K)),
                             ('N', N, count(axes.N))):
    if length % ways:
      raise ValueError(f'{name} = {length} does not divide over {ways} devices; shard another axis')
  ways = count(axes.K, axes.fsdp)
  unit_rows = max(group or 1, each)
  if group and scale.shape[0] > 1 and (K % ways or K // ways % group):
    raise ValueError(f'{K} rows over {ways} devices cut groups of {group}; expected a multiple of '
                     f'{group * ways} rows')
  if ways > 1 and (K % (ways * each) or values.shape[0] != K // each * size):
    raise ValueError(f'{K} rows over {ways} devices cut what is packed; expected a multiple of '
                     f'{ways * unit_rows} rows')


def _devices(mesh, names):
  count = 1
  for n in names:
    count *= mesh.shape[n]
  return count
