"""GPTQ's files (arXiv:2210.17323), as AutoGPTQ and GPTQModel write them: 2, 3, 4 or 8 bits.

Of a matrix of codes in b bits, around whole zero points z; I inputs, O outputs, G groups of inputs:

  qweight int32 [I b / 32, O]   streams of codes along I, the first in the lowest bits of a word
  qzeros  int32 [G, O b / 32]   streams along O: of z in format gptq_v2, of z - 1 in gptq, where
                                the 1 is taken of whole words, so that a z of 0 borrows
  scales  float16 [G O]
  g_idx   int32 [I]             the group of each input: with desc_act in an order of their own

Values are (code - z) * scale; sym means z = 2^(b-1). Conv1D of GPT-2 is stored the same way.
"""
import functools
import re

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop import bits, rounded
from lean_jax.interop.rounded import Matrix, Rounded, chosen
from lean_jax.interop.tensors import FLOATS
from lean_jax.interop.written import Writer, halves
from lean_jax.quantization.spec import QuantSpec

NAME = 'gptq'
ENCODINGS = ('gptq', 'gptq_v2')
_BITS = (2, 3, 4, 8)
# A 1 in each field of a word, of the widths that divide one.
_ONES = {b: np.uint32(sum(1 << k for k in range(0, 32, b))) for b in (2, 4, 8)}


def read(found, how):
  """{name: Tensor or Rounded} of {name: Tensor} and quantization_config.

  Raises:
    InputError: a scheme that is not computed here, or tensors that do not fit it.
  """
  width, out = chosen(how, 'bits', _BITS), dict(found)
  key = 'checkpoint_format' if how.get('checkpoint_format') else 'format'
  form = chosen(how, key, ENCODINGS, ENCODINGS[0])
  other = [k for k in rounded.section(how, 'dynamic') if not k.startswith('-:')]
  if other:
    raise InputError(f'quantization_config has schemes of single modules (dynamic: {other[0]!r}), '
                     'which lean_jax does not read; give a checkpoint with one scheme')
  for module in rounded.modules(found, '.qweight'):
    out[f'{module}.weight'] = _rounded(out, module, how, width, form)
  return out


def _rounded(out, module, how, width, form):
  words = out[f'{module}.qweight'].shape
  if len(words) != 2 or words[0] * 32 % width:
    raise InputError(f'{module}.qweight is {words}, expected whole words of {width} bits along '
                     'the first of two axes; download it again')
  I, O = words[0] * 32 // width, words[1]
  group = rounded.group_of(how, I)
  spec = QuantSpec(width, group, symmetric=how.get('sym', True) is True)
  G = -(-I // group) if group else 1
  found = rounded.taken(out, module, {
      '.qweight': (('I32',), (words[0], O)), '.qzeros': (('I32',), (G, -(-O * width // 32))),
      '.scales': (tuple(FLOATS), (G, O)), '.g_idx': (('I32', 'I64'), (I,))}, optional=('.g_idx',))
  return Rounded(f'{module}.weight', I, O, spec,
                 functools.partial(_read, found, module, spec, I, O, form))


def _read(found, module, spec, I, O, form):
  """The Matrix of tensors."""
  codes = bits.from_words(found['.qweight'].read().T, spec.bits, I).T
  zero = _zeros(found['.qzeros'].read(), spec.bits, O, form)
  half, order = np.uint8(2 ** (spec.bits - 1)), None
  if spec.symmetric:
    if not np.all(zero == half):
      raise InputError(f'{module}.qzeros are not {half}, which quantization_config says (sym); set '
                       'sym to false in config.json')
    codes, zero = (codes - half).view(np.int8), None
  if '.g_idx' in found:
    order = rounded.ordered(found['.g_idx'].read(), spec.group or I, module)
    codes = codes if order is None else codes[order]
  return Matrix(np.ascontiguousarray(codes), found['.scales'].read(), zero, spec, order)


def _zeros(array, width, outputs, form):
  """Zero points [G O], uint8, of qzeros."""
  if form == 'gptq_v2':
    return bits.from_words(array, width, outputs)
  if width in _ONES:
    return bits.from_words((array.view(np.uint32) + _ONES[width]).view(np.int32), width, outputs)
  return bits.from_words(array, width, outputs) + 1 & 7


def writer(modules, floats, encoding):
  """The Writer of these modules; see `written`.

  Raises:
    InputError: a module that the format has no words for.
  """
  form, first = encoding or ENCODINGS[0], modules[0].spec
  for m in modules:
    s = m.spec
    m.must(s.code == 'int' and s.bits in _BITS and not s.tensor and not s.activation_bits,
           'integers of 2, 3, 4 or 8 bits by group or by channel, activations as they are')
    m.must(s == first, f'one scheme for all, here {first}')
    m.must(m.inputs * s.bits % 32 == 0 and m.outputs * s.bits % 32 == 0,
           f'inputs and outputs in whole words, multiples of {32 if s.bits == 3 else 32 // s.bits}')
    m.must(not m.zero or m.zero.kind == 'u', 'zero points that are whole numbers')
    m.must(re.search(r'\.\d+\.', m.name), 'products of layers only')
  inside = lambda names: list(dict.fromkeys(re.sub(r'^.*?\.\d+\.', '', n) for n in names))
  left = [n for n in floats if re.search(r'\.\d+\.', n)]
  how = dict(quant_method=NAME, bits=first.bits, group_size=first.group or -1,
             desc_act=any(m.ordered for m in modules), sym=first.symmetric, lm_head=False,
             checkpoint_format=form, true_sequential=True, damp_percent=.01)
  if left:                                             # said once for each of those who load it
    how |= dict(modules_in_block_to_quantize=[inside(m.name for m in modules)],
                dynamic={f'-:{re.escape(n)}': {} for n in left})
  return Writer(how, _layout, functools.partial(_encode, form))


def _layout(m):
  """{suffix: (shape, dtype)} of a module."""
  width, word = m.spec.bits, np.dtype('<i4')
  G = -(-m.inputs // m.spec.group) if m.spec.group else 1
  return {'.qweight': ((m.inputs * width // 32, m.outputs), word),
          '.qzeros': ((G, m.outputs * width // 32), word),
          '.scales': ((G, m.outputs), np.dtype(np.float16)), '.g_idx': ((m.inputs,), word)}


def _encode(form, m, matrix):
  """{suffix: array} of a module."""
  spec, half = m.spec, np.uint8(2 ** (m.spec.bits - 1))
  codes = matrix.codes.view(np.uint8) + half if spec.symmetric else matrix.codes
  groups = (np.arange(m.inputs) // (spec.group or m.inputs)).astype(np.int32)
  if matrix.order is not None:
    back = np.argsort(matrix.order)
    codes, groups = codes[back], groups[back]
  zero = np.full(matrix.scale.shape, half) if spec.symmetric else matrix.zero
  if form == 'gptq' and not zero.all():
    raise InputError(f'{m.name} has a zero point of 0, which programs read differently in format '
                     "gptq; save with encoding='gptq_v2'")
  words = bits.words(zero - np.uint8(form == 'gptq'), spec.bits)
  return {'.qweight': bits.words(codes.T, spec.bits).T, '.qzeros': words,
          '.scales': halves(m, matrix.scale.astype(np.float32)), '.g_idx': groups}
