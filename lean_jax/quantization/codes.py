"""Numbers as codes: the grid that a scheme lays over a group of them, and the way there and back.

A code is one of few numbers. `fit` finds the scale (and the zero point) of a group, `encode` the
nearest codes, `decode` the numbers that they stand for. Everything is float32, and gives the same
bits in whatever program it is compiled: training rounds as the stored codes do.

  int               (code - zero) * scale
  binary, ternary   scale times -1, 1, or 0 too: BitNet (arXiv:2310.11453, section 2.1), b1.58
                    (arXiv:2402.17764, section 2): the scale is the mean magnitude
  nf4, fp4          scale times one of sixteen numbers: QLoRA (arXiv:2305.14314, section 3 and
                    appendix E), as bitsandbytes has them; its fp4 has 1/192 where the float e2m1,
                    fp4_e2m1 here, has 1/12
  fp8, fp8_e5m2     scale times a float of eight bits (arXiv:2209.05433)
  mxfp4, mxfp8      a power of two times a float of four or eight bits (OCP Microscaling Formats
                    1.0, sections 5 and 6.3)
"""
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

# Quantiles of the normal distribution, 0 among them, in parts of the largest.
NF4 = np.array([
    -1., -.6961928009986877, -.5250730514526367, -.39491748809814453, -.28444138169288635,
    -.18477343022823334, -.09105003625154495, 0., .07958029955625534, .16093020141124725,
    .24611230194568634, .33791524171829224, .44070982933044434, .5626170039176941,
    .7229568362236023, 1.], np.float32)
# A sign, two bits of exponent and one of mantissa, in parts of the largest: 0 to 7 positive.
FP4 = np.array([0., .0052083333, .66666667, 1., .33333333, .5, .16666667, .25], np.float32)
FP4 = np.concatenate([FP4, -FP4])
E2M1 = np.array([0., .5, 1., 1.5, 2., 3., 4., 6.], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
_TABLES = dict(nf4=NF4, fp4=FP4, fp4_e2m1=E2M1 / 6)
FLOATS = dict(fp8=ml_dtypes.float8_e4m3fn, fp8_e5m2=ml_dtypes.float8_e5m2,
              mxfp8=ml_dtypes.float8_e4m3fn)
_TOP = dict(fp8=448., fp8_e5m2=57344., mxfp8=448., mxfp4=6.)     # the greatest value
_BIAS = 127                   # of a power of two in eight bits
_NO_POWER = 255               # is NaN (section 5.4.1)
_FAN = 4                      # parts that `total_of` adds at a time


def fit(x, spec, rows, shrink=1.):
  """The grids of groups.

  Args:
    x: [..., G, g, O], float32; the last group may end in zeros.
    spec: QuantSpec.
    rows: how many rows there are in all groups.
    shrink: the part of the range that the grid covers; a number, or [..., G, O].

  Returns:
    scale [..., G, O] as it will be stored, zero [..., G, O] uint8 or None. A group of zeros has
    scale 1; one with a NaN has scale NaN, so that all its values are.
  """
  if spec.code in ('binary', 'ternary'):
    return positive(_mean(x, spec, rows, jnp.abs) * shrink, spec), None
  axes = (-3, -2, -1) if spec.tensor else -2
  shared = lambda v: v[..., None, None] if spec.tensor else v
  if spec.code != 'int':
    top = shared(magnitude(x, axes)) * shrink
    if spec.code in ('mxfp4', 'mxfp8'):
      return _power(top, spec), None
    return positive(top * (1 / _TOP.get(spec.code, 1.)), spec), None
  if spec.symmetric:
    return positive(shared(magnitude(x, axes)) * shrink * (1 / spec.high), spec), None
  top = jnp.maximum(shared(with_nan(jnp.max(x, axis=axes), x, axes)), 0) * shrink
  bottom = jnp.minimum(shared(jnp.min(x, axis=axes)), 0) * shrink
  scale = positive((top - bottom) * (1 / (spec.high - spec.low)), spec)
  zero = jnp.round(-bottom / scale.astype(jnp.float32))
  return scale, jnp.clip(zero, spec.low, spec.high).astype(jnp.uint8)


def centred(x, spec, rows):
  """x [..., G, g, O] as it is encoded: of a binary code less its mean (arXiv:2310.11453, eq. 1)."""
  return x - _mean(x, spec, rows)[..., None, :] if spec.code == 'binary' else x


def encode(x, scale, zero, spec):
  """The codes nearest to x, int8 of symmetric integers, else uint8; what is beyond is clipped."""
  unit = x / wide(scale, spec)
  if spec.code == 'nf4':
    return _nearest(unit, NF4)
  if spec.code in _TABLES:                                 # a small negative is -0
    size = _nearest(jnp.abs(unit), _TABLES[spec.code][:8])
    return size + jnp.where(unit < 0, 8, 0).astype(jnp.uint8)
  if spec.code == 'mxfp4':
    return _even(unit)
  if spec.code in FLOATS:
    top = _TOP[spec.code]
    return jax.lax.bitcast_convert_type(
        jnp.clip(unit, -top, top).astype(FLOATS[spec.code]), jnp.uint8)
  if spec.code == 'binary':
    return (x > 0).astype(jnp.uint8)
  if spec.code == 'ternary':
    return (jnp.clip(jnp.round(unit), -1, 1) + 1).astype(jnp.uint8)
  shift = 0 if zero is None else zero.astype(jnp.float32)
  codes = jnp.clip(jnp.round(unit + shift), spec.low, spec.high)
  return codes.astype(jnp.int8 if spec.symmetric else jnp.uint8)


def decode(codes, scale, zero, spec, dtype):
  """The numbers that codes stand for."""
  value = number(codes, spec, dtype)
  if zero is not None:
    value = value - zero.astype(dtype)
  return value * wide(scale, spec).astype(dtype)


def number(codes, spec, dtype):
  """What codes are in parts of the scale, the zero point apart."""
  if spec.code in _TABLES or spec.code == 'mxfp4':
    return _looked_up(_TABLES.get(spec.code, E2M1), codes).astype(dtype)
  if spec.code in FLOATS:
    return jax.lax.bitcast_convert_type(codes, FLOATS[spec.code]).astype(dtype)
  if spec.code in ('binary', 'ternary'):
    return integers(codes, spec).astype(dtype)
  return codes.astype(dtype)


def integers(codes, spec):
  """int8 codes that a product of integers takes, of a symmetric scheme."""
  if spec.code == 'binary':
    return (2 * codes).astype(jnp.int8) - jnp.int8(1)
  return codes.astype(jnp.int8) - jnp.int8(1) if spec.code == 'ternary' else codes


@functools.partial(jax.jit, static_argnames='spec', inline=True)
def signed(codes, spec):
  """Codes as `encode` gives them, of those as `packing.unpack` gives them."""
  if spec.code != 'int' or not spec.symmetric or spec.bits == 8:
    return codes
  half = 2 ** (spec.bits - 1)
  return (codes ^ half).astype(jnp.int8) - jnp.int8(half)


def wide(scale, spec):
  """Scales as float32."""
  if spec.code not in ('mxfp4', 'mxfp8'):
    return scale.astype(jnp.float32)
  bits = scale.astype(jnp.int32) << 23                   # the exponent's place in a float32
  value = jax.lax.bitcast_convert_type(jnp.where(bits == 0, 1 << 22, bits), jnp.float32)
  return jnp.where(scale == _NO_POWER, jnp.nan, value)


def stored_dtype(spec):
  """Of scales: bfloat16 where there are many of integers, else float32 (or a power's exponent)."""
  if spec.code in ('mxfp4', 'mxfp8'):
    return jnp.uint8
  return jnp.bfloat16 if spec.group and spec.code not in _TABLES else jnp.float32


def magnitude(x, axis, keepdims=False):
  """The greatest magnitude along axes, 0 of nothing; NaN where there is a NaN."""
  return with_nan(jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims, initial=0), x, axis, keepdims)


def with_nan(found, x, axis, keepdims=False):
  """What was found along axes of x, or NaN where x has one there.

  On CPUs the maximum and the minimum that XLA takes along an axis lose a NaN. A sum of magnitudes
  keeps it, and is never NaN without one; compilers take it in the same pass, or in one as fast.
  """
  # No `jnp.abs`: if two reductions take the same magnitudes, XLA writes them out on CPUs.
  total = jnp.sum(jnp.maximum(x, -x), axis=axis, keepdims=keepdims)
  return jnp.where(jnp.isnan(total), jnp.nan, found)


def total_of(x, axis, each=lambda part: part):
  """Sums of each(x) along an axis in one order: the same bits in whatever program, which
  `jnp.sum` does not promise.

  A quarter of the rows is left after each step, sums of four that are far apart: compilers make
  one loop of a few steps, and little is written out.
  """
  x = jnp.moveaxis(x, axis, 0)
  while (rows := x.shape[0]) > 1:
    parts = min(_FAN, rows)
    size = rows // parts
    total = each(x[:size])
    for k in range(1, parts):
      total = total + each(x[k * size:(k + 1) * size])
    x = jnp.concatenate([total, each(x[parts * size:])]) if rows % parts else total
    each = lambda part: part
  return each(x[0])


def positive(scale, spec):
  """Scales as they are stored, 1 in the place of 0; a NaN stays one."""
  scale = jnp.where(scale == 0, 1, scale).astype(stored_dtype(spec))
  return jnp.where(scale == 0, jnp.finfo(scale.dtype).tiny, scale)      # what rounded to zero


def _mean(x, spec, rows, each=lambda part: part):
  """The mean of what shares a scale, of each(x), [..., G, O] or [..., 1, 1]; x as `fit` takes it.
  """
  G, g = x.shape[-3:-1]
  count = jnp.clip(rows - g * jnp.arange(G), 1, g).reshape((1,) * (x.ndim - 3) + (G, 1))
  total = total_of(x, -2, each)
  if spec.tensor:
    total = total_of(total_of(total, -2)[..., None], -2)[..., None]
    count = jnp.full((1,) * total.ndim, rows * x.shape[-1])
  return total / count


def _power(top, spec):
  """Exponents: that of the largest value, less that of the code's greatest (section 6.3)."""
  exponent = jnp.frexp(top)[1] - 1 - int(np.log2(_TOP[spec.code]))
  power = jnp.clip(jnp.where(top > 0, exponent, 0) + _BIAS, 1, 254)
  return jnp.where(jnp.isnan(top), _NO_POWER, power).astype(jnp.uint8)


def _nearest(unit, table):
  """The code of the nearest number in a table; of a NaN that of the greatest.

  Selects, and not `jnp.searchsorted`: compilers make one loop of them and what is around them.
  """
  order = np.argsort(table, kind='stable')
  ordered = table[order]
  found = jnp.full(unit.shape, order[0], jnp.uint8)
  for middle, code in zip((ordered[1:] + ordered[:-1]) / 2, order[1:]):
    found = jnp.where(unit <= middle, found, jnp.uint8(code))
  return found


def _looked_up(table, codes):
  """table[codes], by a select a bit; a TPU reads tables one number at a time."""
  found, bit = list(table), 1
  while len(found) > 1:
    odd = (codes & bit) != 0
    found = [jnp.where(odd, b, a) for a, b in zip(found[::2], found[1::2])]
    bit *= 2
  return found[0]


def _even(unit):
  """The code of the nearest e2m1 float, of two the one with an even mantissa."""
  size = jnp.abs(unit)
  # Above the middles of 0 .5 1 1.5 2 3 4 6; at one, the even code is every other time the lower.
  above = [size > .25, size >= .75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.]
  code = sum(a.astype(jnp.uint8) for a in above)
  return code + jnp.where(jnp.signbit(unit), 8, 0).astype(jnp.uint8)
