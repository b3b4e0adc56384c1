"""Integer formats: what a scheme's name means, and how numbers enter and leave it.

Everything here is on matrices [..., I, O], I the axis that a product sums over.
"""
import dataclasses
import difflib
import re

import jax.numpy as jnp

from lean_jax.errors import InputError

GRAMMAR = ('w<2|4|8>a16[-g<group>][-sym|-asym] or w8a8, for example w8a8, w8a16, w4a16-g64, '
           'w2a16-g64')
KNOWN = ('w8a8', 'w8a16', 'w8a16-g64', 'w4a16', 'w4a16-g32', 'w4a16-g64', 'w4a16-g128',
         'w4a16-g64-asym', 'w2a16', 'w2a16-g16', 'w2a16-g32', 'w2a16-g64', 'w2a16-g64-sym')


@dataclasses.dataclass(frozen=True)
class QuantSpec:
  """Weights of `bits` bits, one scale for `group` consecutive inputs of an output channel.

  Attributes:
    bits: 2, 4 or 8 of a stored weight.
    group: inputs that share a scale; None is the whole axis (one scale an output channel).
    activation_bits: 8 rounds the activations too, one range a token; None leaves them.
    symmetric: codes around 0; otherwise from the least to the greatest value, with a zero point.
  """
  bits: int
  group: int | None = None
  activation_bits: int | None = None
  symmetric: bool = True

  def __str__(self):
    group = f'-g{self.group}' if self.group else ''
    kind = '' if self.symmetric == (self.bits > 2) else '-sym' if self.symmetric else '-asym'
    return f'w{self.bits}a{self.activation_bits or 16}{group}{kind}'

  @property
  def scale_dtype(self):
    """bfloat16 where there are many scales, float32 where there is one a channel."""
    return jnp.bfloat16 if self.group else jnp.float32

  @property
  def low(self):
    """The least code."""
    return -(2 ** (self.bits - 1)) if self.symmetric else 0

  @property
  def high(self):
    """The greatest code."""
    return self.low + 2 ** self.bits - 1


def parse_spec(text):
  """The QuantSpec of a scheme's name.

  Two bits default to an asymmetric grid, more to a symmetric one: of four levels a symmetric grid
  uses three.

  Raises:
    InputError: the name is not in the grammar, or names what no product here computes.
  """
  if isinstance(text, QuantSpec):
    return text
  match = re.fullmatch(r'w(2|4|8)a(8|16)(?:-g([1-9]\d*))?(?:-(sym|asym))?', str(text))
  if not match:
    near = difflib.get_close_matches(str(text), KNOWN, n=2, cutoff=0.3)
    hint = f'; near it: {", ".join(near)}' if near else ''
    raise InputError(f'no scheme {text!r}; expected {GRAMMAR}{hint}')
  bits, group = int(match[1]), int(match[3]) if match[3] else None
  activation_bits = 8 if match[2] == '8' else None
  symmetric = match[4] == 'sym' or (match[4] is None and bits > 2)
  if activation_bits and (bits != 8 or group or not symmetric):
    raise InputError(f'scheme {text!r}: 8-bit activations go with w8a8 only; use w8a8, or '
                     f'w{bits}a16{f"-g{group}" if group else ""}')
  return QuantSpec(bits, group, activation_bits, symmetric)


def quantize(x, spec):
  """Rounds to nearest.

  Args:
    x: [..., I, O], float.
    spec: QuantSpec. A group that does not divide I leaves a shorter last group.

  Returns:
    codes [..., I, O], int8 or uint8; scale [..., G, O] in spec.scale_dtype; zero [..., G, O]
    uint8, or None if symmetric. x is about (codes - zero) * scale, with an error of at most
    scale / 2 inside the range; the scale is rounded before the codes are, so that the codes are
    the nearest ones to the scale as stored.
  """
  grouped = _grouped(x.astype(jnp.float32), spec)                        # [..., G, g, O]
  if spec.symmetric:
    scale = jnp.max(jnp.abs(grouped), axis=-2) / spec.high
  else:
    top = jnp.maximum(jnp.max(grouped, axis=-2), 0)
    bottom = jnp.minimum(jnp.min(grouped, axis=-2), 0)
    scale = (top - bottom) / (spec.high - spec.low)
  scale = jnp.where(scale > 0, scale, 1).astype(spec.scale_dtype)
  wide = scale.astype(jnp.float32)
  if spec.symmetric:
    zero, shift = None, jnp.zeros_like(wide)
  else:
    shift = jnp.clip(jnp.round(-bottom / wide), spec.low, spec.high)
    zero = shift.astype(jnp.uint8)
  codes = jnp.round(grouped / wide[..., None, :]) + shift[..., None, :]
  codes = jnp.clip(codes, spec.low, spec.high).astype(jnp.int8 if spec.symmetric else jnp.uint8)
  *batch, _, _, O = codes.shape
  return codes.reshape(*batch, -1, O)[..., :x.shape[-2], :], scale, zero


def dequantize(codes, scale, zero, spec, dtype):
  """(codes - zero) * scale, [..., I, O] in `dtype`."""
  wide = _grouped(codes, spec).astype(dtype)
  if zero is not None:
    wide = wide - zero[..., None, :].astype(dtype)
  wide = wide * scale[..., None, :].astype(dtype)
  *batch, _, _, O = wide.shape
  return wide.reshape(*batch, -1, O)[..., :codes.shape[-2], :]


def pack(codes, bits):
  """Codes of `bits` bits, [..., I, O], as bytes [..., ceil(I * bits / 8), O].

  The first row of a byte's rows is in its lowest bits. Codes of 8 bits are stored as they are.
  """
  if bits == 8:
    return codes
  each = 8 // bits
  codes = _padded(codes, each)
  *batch, I, O = codes.shape
  parts = codes.astype(jnp.uint8).reshape(*batch, I // each, each, O) & (2 ** bits - 1)
  shifts = jnp.arange(each, dtype=jnp.uint8) * bits
  shifted = parts << jnp.broadcast_to(shifts[:, None], parts.shape)
  return jnp.sum(shifted, axis=-2, dtype=jnp.uint8)


def unpack(values, spec, rows):
  """The inverse of `pack`: [..., rows, O], int8 or uint8."""
  if spec.bits == 8:
    return values
  each = 8 // spec.bits
  *batch, packed, O = values.shape
  shifts = jnp.arange(each, dtype=jnp.uint8) * spec.bits
  spread = jnp.broadcast_to(values[..., :, None, :], (*batch, packed, each, O))
  codes = (spread >> jnp.broadcast_to(shifts[:, None], spread.shape)) & (2 ** spec.bits - 1)
  codes = codes.reshape(*batch, packed * each, O)[..., :rows, :]
  if not spec.symmetric:
    return codes
  half = 2 ** (spec.bits - 1)
  return (codes ^ half).astype(jnp.int8) - jnp.int8(half)


def _grouped(x, spec):
  """[..., I, O] as [..., G, g, O], the last group filled with zeros."""
  group = min(spec.group, x.shape[-2]) if spec.group else x.shape[-2]
  x = _padded(x, group)
  *batch, I, O = x.shape
  return x.reshape(*batch, I // group, group, O)


def _padded(x, multiple):
  """x with zeros after its last row, up to a multiple of rows."""
  more = -x.shape[-2] % multiple
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)]) if more else x
