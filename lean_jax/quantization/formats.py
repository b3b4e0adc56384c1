"""Matrices into a format and out of it: [..., I, O], I the axis that a product sums over."""
import functools

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.quantization import codes as grid
from lean_jax.quantization.nested import nested
from lean_jax.quantization.packing import padded


@functools.partial(jax.jit, static_argnames='spec')
def quantize(x, spec, shrink=1.):
  """Rounds to nearest.

  Args:
    x: [..., I, O], float.
    spec: QuantSpec. A group that does not divide I leaves a shorter last group.
    shrink: the part of each group's range that the codes cover, what is beyond it is clipped; a
      number, or [..., G, O].

  Returns:
    codes [..., I, O], int8 or uint8; scale [..., G, O]; zero [..., G, O] uint8, or None if
    symmetric. The scale is rounded before the codes are, so that the codes are the nearest ones to
    the scale as stored; but for double quantization, where bitsandbytes does not either.

  Raises:
    InputError: the group is larger than I.
  """
  split = grouped(x.astype(jnp.float32), spec)                           # [..., G, g, O]
  scale, zero = grid.fit(split, spec, x.shape[-2], shrink)
  split = grid.centred(split, spec, x.shape[-2])
  found = grid.encode(split, scale[..., None, :], None if zero is None else zero[..., None, :],
                      spec)
  return ungrouped(found, x.shape[-2]), nested(scale) if spec.double else scale, zero


@functools.partial(jax.jit, static_argnames=('spec', 'dtype'), inline=True)
def dequantize(codes, scale, zero, spec, dtype):
  """The values that codes stand for, [..., I, O] in `dtype`."""
  split = grouped(codes, spec)
  if spec.double or not hasattr(scale, 'dtype'):
    scale = scale.astype(jnp.float32)
  value = grid.decode(split, scale[..., None, :], None if zero is None else zero[..., None, :],
                      spec, dtype)
  return ungrouped(value, codes.shape[-2])


def grouped(x, spec):
  """[..., I, O] as [..., G, g, O], the last group filled with zeros."""
  if spec.group and spec.group > x.shape[-2]:
    raise InputError(f'groups of {spec.group} inputs, and the weight has {x.shape[-2]}; give a '
                     'smaller group, or none')
  group = spec.group or x.shape[-2]
  x = padded(x, group)
  *batch, I, O = x.shape
  return x.reshape(*batch, I // group, group, O)


def ungrouped(x, rows):
  """The inverse of `grouped`."""
  *batch, _, _, O = x.shape
  return x.reshape(*batch, -1, O)[..., :rows, :]
