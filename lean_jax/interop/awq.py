"""AWQ's files (arXiv:2306.00978), of AutoAWQ in its version gemm: four bits.

Of a matrix of codes around whole zero points z; I inputs, O outputs, G groups of inputs: qweight
int32 [I, O / 8] and qzeros int32 [G, O / 8], eight codes of outputs a word, its nibbles, from the
lowest, of outputs 0 2 4 6 1 3 5 7; scales float16 [G O]. Values are (code - z) * scale. A symmetric
matrix is written with zero points of 8, and comes back with them.
"""
import functools

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop import bits, rounded
from lean_jax.interop.rounded import Matrix, Rounded, chosen
from lean_jax.interop.tensors import FLOATS
from lean_jax.interop.written import Writer, halves
from lean_jax.quantization.spec import QuantSpec

NAME = 'awq'
ENCODINGS = ()
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_EACH, _BITS = len(_ORDER), 4


def read(found, how):
  """{name: Tensor or Rounded} of {name: Tensor} and quantization_config.

  Raises:
    InputError: a version that is not read here, or tensors that do not fit it.
  """
  key = 'version' if how.get('version') else 'format'
  chosen({key: str(how.get(key, 'gemm')).lower()}, key, ('gemm',))
  chosen(how, 'bits', (_BITS,), _BITS)
  chosen(how, 'zero_point', (True,), True)
  out = dict(found)
  for module in rounded.modules(found, '.qweight'):
    out[f'{module}.weight'] = _rounded(out, module, how)
  return out


def _rounded(out, module, how):
  words = out[f'{module}.qweight'].shape
  if len(words) != 2:
    raise InputError(f'{module}.qweight is {words}, expected two axes; download it again')
  I, O = words[0], words[1] * _EACH
  spec = QuantSpec(_BITS, rounded.group_of(how, I), symmetric=False)
  G = -(-I // spec.group) if spec.group else 1
  found = rounded.taken(out, module, {
      '.qweight': (('I32',), (I, O // _EACH)), '.qzeros': (('I32',), (G, O // _EACH)),
      '.scales': (tuple(FLOATS), (G, O))})
  return Rounded(f'{module}.weight', I, O, spec, functools.partial(_read, found, spec, O))


def _read(found, spec, O):
  """The Matrix of tensors."""
  codes, zero = (_unpacked(found[k].read(), O) for k in ('.qweight', '.qzeros'))
  return Matrix(codes, found['.scales'].read(), zero, spec)


def _unpacked(array, O):
  """Codes [R O] of words [R O / 8]."""
  codes = bits.from_words(array, _BITS, O).reshape(len(array), -1, _EACH)
  return np.ascontiguousarray(codes[..., np.argsort(_ORDER)]).reshape(len(array), O)


def _packed(codes):
  """The inverse of `_unpacked`."""
  wide = codes.reshape(len(codes), -1, _EACH)[..., _ORDER]
  return bits.words(np.ascontiguousarray(wide).reshape(codes.shape), _BITS)


def writer(modules, floats, encoding):
  """The Writer of these modules; see `written`.

  Raises:
    InputError: a module that the format has no words for.
  """
  del encoding                                         # there is one
  first = modules[0].spec
  for m in modules:
    s = m.spec
    m.must((s.code, s.bits, s.tensor, s.activation_bits) == ('int', _BITS, False, None),
           'integers of 4 bits by group or by channel, activations as they are')
    m.must(s.group == first.group, f'groups of one size, here those of {first}')
    m.must(m.outputs % _EACH == 0, f'outputs in whole words, multiples of {_EACH}')
    m.must(not s.group or m.inputs % s.group == 0, 'groups that divide the inputs')
    m.must(not m.zero or m.zero.kind == 'u', 'zero points that are whole numbers')
    m.must(not m.ordered, 'inputs in their order')
    m.must(not m.transposed, "Linear modules, and this model's are Conv1D")
  how = dict(quant_method=NAME, version='gemm', bits=_BITS, group_size=first.group or -1,
             zero_point=True, modules_to_not_convert=floats)
  return Writer(how, _layout, _encode)


def _layout(m):
  """{suffix: (shape, dtype)} of a module."""
  word, G = np.dtype('<i4'), m.inputs // m.spec.group if m.spec.group else 1
  return {'.qweight': ((m.inputs, m.outputs // _EACH), word),
          '.qzeros': ((G, m.outputs // _EACH), word),
          '.scales': ((G, m.outputs), np.dtype(np.float16))}


def _encode(m, matrix):
  """{suffix: array} of a module."""
  half = np.uint8(2 ** (_BITS - 1))
  codes, zero = matrix.codes, matrix.zero
  if m.spec.symmetric:
    codes, zero = codes.view(np.uint8) + half, np.full(matrix.scale.shape, half)
  return {'.qweight': _packed(codes), '.qzeros': _packed(zero),
          '.scales': halves(m, matrix.scale.astype(np.float32))}
