"""Matrices as blocks of GGUF's types: those already in codes, and K types.

Codes and scales that a type has are copied. K types, which the format's own package reads and does
not write, are encoded here: of each group of numbers several ranges are tried, each with the scale
(and the least number) that is best for its codes by least squares; then the scales are rounded to
the six or eight bits that they are stored in, their neighbours tried too. The layouts are those
that `gguf_codes` reads.
"""
import dataclasses

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop.gguf_codes import KINDS
from lean_jax.quantization.nested import Nested

GROUP = 32                    # codes that share a scale, of types that codes are copied into
BLOCK = 256                   # numbers
SIZES = dict(Q4_K=144, Q6_K=210)
_CHUNK = 4096                 # blocks at a time


def type_of(w):
  """The smallest type that has the codes of a Quantized as they are, or None: Q4_0 of w4a16-g64.

  Groups are any number of its own, and codes of fewer bits fit into more.
  """
  s, rows = w.spec, w.matrix_rows
  if w.order is not None or isinstance(w.scale, Nested) or s.activation_bits or rows % GROUP or (
      (s.group or rows) % GROUP):
    return None
  fits = lambda t: (t.group == GROUP and t.bits >= s.bits
                    and dataclasses.replace(s, bits=t.bits, group=GROUP, tensor=False) == t)
  return next((k for k, (*_, t) in sorted(KINDS.items(), key=lambda item: item[1][1])
               if k not in SIZES and k != 'Q5_K' and fits(t)), None)


def copied(matrix, kind, name):
  """A `rounded.Matrix` in a type of `type_of` as bytes [O, row], scales to the nearest float16.

  Raises:
    InputError: scales are past float16, of the tensor `name`.
  """
  I, O = matrix.codes.shape
  rows = lambda x: np.ascontiguousarray(x.T)
  each = lambda x: rows(np.repeat(np.broadcast_to(x, (len(x), O)), I // GROUP // len(x), axis=0))
  codes = rows(matrix.codes).reshape(O, -1, GROUP)
  if kind == 'MXFP4':
    parts = [each(matrix.scale)[..., None], _nibbles(codes)]
    return np.concatenate(parts, axis=-1).reshape(O, -1)
  scale = each(matrix.scale.astype(np.float32))
  parts = [_half(scale)]
  if matrix.zero is not None:
    parts.append(_half(-each(matrix.zero.astype(np.float32)) * scale))
  if not all(np.isfinite(x).all() for x in parts) or not parts[0].all():
    raise InputError(f'{name} has scales that are no float16, from {scale.min():g} to '
                     f'{scale.max():g}; save with encoding F32, or format lean')
  parts = [_bytes(x[..., None]) for x in parts]
  bits = KINDS[kind][2].bits
  if bits == 8:
    return np.concatenate([*parts, codes.view(np.uint8)], axis=-1).reshape(O, -1)
  if matrix.zero is None:
    codes = (codes + 2 ** (bits - 1)).astype(np.uint8)
  if bits == 5:
    parts.append(np.packbits(codes >> 4, axis=-1, bitorder='little'))
  return np.concatenate([*parts, _nibbles(codes & 15)], axis=-1).reshape(O, -1)


def _nibbles(codes):
  """Codes [... 32] as bytes [... 16], the first half of them below."""
  return codes[..., :16] | codes[..., 16:] << 4


def encode(x, kind):
  """Rows [O, I] of float32, I whole blocks, as bytes [O, row]."""
  blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
  one = dict(Q4_K=q4_k, Q6_K=q6_k)[kind]
  out = np.concatenate([one(blocks[k:k + _CHUNK]) for k in range(0, len(blocks), _CHUNK)])
  return out.reshape(x.shape[0], -1)


def q4_k(x):
  """Blocks [n 256] as bytes [n 144]: eight groups of 32 codes of four bits, scale * code - least.
  """
  x = x.reshape(-1, 8, 32)
  scale, least = _affine(x, 15)
  top, low = (_half(v.max(axis=1, keepdims=True) / 63) for v in (scale, least))       # [n 1]
  s, m = (np.clip(np.round(_ratio(v, t)), 0, 63) for v, t in ((scale, top), (least, low)))
  fits = lambda s, m: np.clip(np.round(_ratio(x + (low * m)[..., None], (top * s)[..., None])), 0,
                              15)
  value = lambda s, m, codes: (top * s)[..., None] * codes - (low * m)[..., None]
  steps = [(a, b) for a in (0, -1, 1) for b in (0, -1, 1)]
  s, m = _best(x, steps, (s, m), 63, fits, value)
  codes, s, m = fits(s, m).astype(np.uint8), s.astype(np.uint8), m.astype(np.uint8)
  packed = np.concatenate([s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6,
                           s[:, 4:] & 15 | (m[:, 4:] & 15) << 4], axis=1)
  codes = codes.reshape(-1, 4, 2, 32)
  return np.concatenate([_bytes(top), _bytes(low), packed,
                         (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(-1, 128)], axis=1)


def q6_k(x):
  """Blocks [n 256] as bytes [n 210]: sixteen groups of 16 codes of six bits around 32."""
  x = x.reshape(-1, 16, 16)
  scale = _linear(x, -32, 31)
  top = _half(np.abs(scale).max(axis=1, keepdims=True) / 127)
  s = np.clip(np.round(_ratio(scale, top)), -128, 127)
  fits = lambda s: np.clip(np.round(_ratio(x, (top * s)[..., None])), -32, 31)
  value = lambda s, codes: (top * s)[..., None] * codes
  s, = _best(x, [(a,) for a in (0, -1, 1)], (s,), 127, fits, value)
  codes = (fits(s) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
  low = codes.reshape(-1, 2, 2, 64) & 15
  high = sum(codes[:, :, k] >> 4 << 2 * k for k in range(4))
  return np.concatenate([
      (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128), high.reshape(-1, 64).astype(np.uint8),
      s.astype(np.int8).view(np.uint8), _bytes(top)], axis=1)


def _affine(x, high):
  """scale, least [n G], both at least 0, of codes 0 to high that stand for scale * code - least."""
  bottom, top = np.minimum(x.min(-1, keepdims=True), 0), x.max(-1, keepdims=True)
  reach = np.maximum(top - bottom, 1e-20)
  best = [np.full(x.shape[:-1], np.inf), np.zeros(x.shape[:-1]), np.zeros(x.shape[:-1])]
  for more in np.linspace(-2.5, 3., 56):
    q = np.clip(np.round((x - bottom) * ((high + more) / reach)), 0, high)
    count, sq, sqq = x.shape[-1], q.sum(-1), (q * q).sum(-1)
    sx, sxq = x.sum(-1), (x * q).sum(-1)
    det = count * sqq - sq * sq
    scale = np.where(det > 0, _ratio(count * sxq - sq * sx, det), 0)
    least = np.where(det > 0, _ratio(sq * sxq - sqq * sx, det), -sx / count)
    alone = least < 0                                   # a least number above 0 is not stored
    scale, least = np.where(alone, _ratio(sxq, sqq), scale), np.where(alone, 0, least)
    scale = np.maximum(scale, 0)
    error = ((scale[..., None] * q - least[..., None] - x) ** 2).sum(-1)
    better = error < best[0]
    best = [np.where(better, new, old) for new, old in zip((error, scale, least), best)]
  return best[1], best[2]


def _linear(x, low, high):
  """scale [n G], of either sign, of codes low to high that stand for scale * code."""
  at = np.abs(x).argmax(-1)[..., None]
  extreme = np.take_along_axis(x, at, -1)
  least, out = np.full(x.shape[:-1], np.inf), np.zeros(x.shape[:-1])
  for end in (low, high):
    for more in np.linspace(-.9, .9, 19):
      q = np.clip(np.round(x * _ratio(end + more, extreme)), low, high)
      scale = _ratio((x * q).sum(-1), (q * q).sum(-1))
      error = ((scale[..., None] * q - x) ** 2).sum(-1)
      least, out = np.where(error < least, error, least), np.where(error < least, scale, out)
  return out


def _best(x, steps, start, top, fits, value):
  """Of stored scales and their neighbours, those of the least error of each group."""
  least, out = np.full(x.shape[:-1], np.inf), start
  for step in steps:
    given = [np.clip(v + d, -128 if top == 127 else 0, top) for v, d in zip(start, step)]
    error = ((value(*given, fits(*given)) - x) ** 2).sum(-1)
    better = error < least
    out = [np.where(better, new, old) for new, old in zip(given, out)]
    least = np.where(better, error, least)
  return out


def _ratio(a, b):
  """a / b, and 0 where b is 0."""
  a, b = np.broadcast_arrays(a, b)
  return np.divide(a, b, out=np.zeros(b.shape), where=b != 0)


def _half(x):
  """x as a float16 stores it."""
  return x.astype('<f2').astype(np.float32)


def _bytes(x):
  """Numbers [n 1] as the bytes [n 2] of float16."""
  return np.ascontiguousarray(x.astype('<f2')).view(np.uint8)
