"""bitsandbytes: NF4 and FP4 (QLoRA, arXiv:2305.14314), and LLM.int8() (arXiv:2208.07339).

Four bits. The values of a matrix [O I], row after row, are blocks of 64 (a power of two): `weight`
uint8 [O I / 2, 1], a pair in each byte, its first in the high nibble; `weight.absmax` float32, one
a block; `weight.quant_map` float32 [16], what codes stand for; JSON as uint8, quant_type,
blocksize, dtype and shape, in `weight.quant_state.bitsandbytes__nf4` (or fp4). Of double
quantization absmax is uint8, `weight.nested_quant_map` float32 [256] what these stand for, in parts
of `weight.nested_absmax`, one a 256 of them, around JSON's nested_offset.

Eight bits. `weight` int8 [O I] and `SCB` float32 [O], the largest magnitude of each row, of a
float16 weight: values are code * SCB / 127. Activations are rounded too, but for columns beyond
llm_int8_threshold. With a threshold of 0 that is w8a8; with another the weight is opened as w8a16,
nearer to the floats than what bitsandbytes computes.

Conv1D of GPT-2 is stored [O I] as well.
"""
import functools
import json
import math

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop import rounded
from lean_jax.interop.rounded import Matrix, Rounded
from lean_jax.interop.written import Writer
from lean_jax.quantization.codes import FP4, NF4
from lean_jax.quantization.nested import BLOCK, Nested, dynamic_numbers
from lean_jax.quantization.spec import QuantSpec

NAME = 'bitsandbytes'
ENCODINGS = ()
_TABLES = dict(nf4=NF4, fp4=FP4)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = '.weight.quant_state.bitsandbytes__'
_MOST = 1 << 12               # bytes of JSON
_STORAGE = ('U8', 'BF16', 'F16', 'F32')                # dtypes that bytes of four bits are kept as
_UNIT = np.float32(1 / 127)
_THRESHOLD = 6.               # of LLM.int8(), section 3.2


def read(found, how):
  """{name: Tensor or Rounded} of {name: Tensor} and quantization_config.

  Raises:
    InputError: tensors that do not go together.
  """
  threshold, out = how.get('llm_int8_threshold', _THRESHOLD), dict(found)
  if type(threshold) not in (int, float):
    raise InputError(f'quantization_config has llm_int8_threshold = {threshold!r}, expected a '
                     'number; download config.json again')
  for code in _TABLES:
    for module in rounded.modules(found, f'{_STATE}{code}'):
      out[f'{module}.weight'] = _four(out, module, code)
  for module in rounded.modules(found, '.SCB'):
    out[f'{module}.weight'] = _eight(out, module, None if threshold else 8)
  return out


def _eight(out, module, activation_bits):
  wanted = {'.weight': (('I8',), (None, None)), '.SCB': (('F32',), (None,)),
            '.weight_format': (('U8',), ())}
  found = rounded.taken(out, module, wanted, optional=('.weight_format',))
  (O, I), (rows,) = found['.weight'].shape, found['.SCB'].shape
  form = found['.weight_format'].read().item() if '.weight_format' in found else 0
  if rows != O or form:
    raise InputError(f'{module} has {O} rows, SCB of {rows} and weight_format {form}, expected as '
                     'many and 0; download it again, or save it with a newer bitsandbytes')
  spec = QuantSpec(8, activation_bits=activation_bits)

  def matrix():
    scale = found['.SCB'].read() * _UNIT
    return Matrix(np.ascontiguousarray(found['.weight'].read().T), scale[None], None, spec)
  return Rounded(f'{module}.weight', I, O, spec, matrix)


def _four(out, module, code):
  key = f'{_STATE}{code}'
  state = _state(rounded.taken(out, module, {key: (('U8',), (None,))})[key], code)
  (O, I), size = state['shape'], state['blocksize']
  blocks, double = -(-O * I // size), f'{module}.weight.nested_absmax' in out
  wanted = {'.weight': (_STORAGE, (None, 1)), '.weight.quant_map': (('F32',), (16,)),
            '.weight.absmax': (('U8' if double else 'F32',), (blocks,))}
  if double:
    wanted |= {'.weight.nested_absmax': (('F32',), (-(-blocks // BLOCK),)),
               '.weight.nested_quant_map': (('F32',), (256,))}
  found = rounded.taken(out, module, wanted)
  tensor = found['.weight']
  if tensor.shape[0] * tensor.dtype.itemsize != -(-O * I // 2):
    raise InputError(f'{tensor.name} is {tensor.kind} {tensor.shape}, expected the '
                     f'{-(-O * I // 2)} bytes of {O} x {I} numbers; download it again')
  maps = {'.weight.quant_map': _TABLES[code], '.weight.nested_quant_map': dynamic_numbers()}
  odd = [module + k for k, table in maps.items() if k in found
         and not np.allclose(found[k].read(), table, rtol=0, atol=1e-6)]
  if odd or (double and not isinstance(state.get('nested_offset'), float)):
    raise InputError(f'{(odd or [module + key])[0]} is not that of {code} as bitsandbytes has it; '
                     'give a checkpoint of its own tables')
  # A row that is no whole blocks is groups of what divides both.
  group = math.gcd(size, I)
  spec = QuantSpec(4, group, code=code, double=double and group == size)
  return Rounded(f'{module}.weight', I, O, spec,
                 functools.partial(_read, found, spec, I, O, size, state.get('nested_offset')))


def _state(tensor, code):
  """The JSON of quant_state.

  Raises:
    InputError: it is none, or not of a matrix.
  """
  try:
    state = json.loads(tensor.read().tobytes()) if tensor.shape[0] <= _MOST else None
  except (ValueError, RecursionError):
    state = None
  shape = state.get('shape') if isinstance(state, dict) else None
  if not (isinstance(shape, list) and len(shape) == 2
          and all(type(n) is int and 0 < n < 1 << 31 for n in shape)
          and state.get('blocksize') in _BLOCKS and state.get('quant_type') == code
          and state.get('nested_blocksize', BLOCK) == BLOCK):
    raise InputError(f'{tensor.name} is {str(state)[:200]}, expected JSON with quant_type {code}, '
                     f'blocksize, a shape of two, and nested_blocksize {BLOCK} if any; download it '
                     'again')
  return state


def _read(found, spec, I, O, size, offset):
  """The Matrix of tensors in four bits."""
  raw = found['.weight'].read().view(np.uint8).reshape(-1)
  codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(-1)[:O * I].reshape(O, I).T
  scale, G = found['.weight.absmax'].read(), I // spec.group
  if spec.double:
    scale = Nested(np.ascontiguousarray(scale.reshape(O, G).T), found[
        '.weight.nested_absmax'].read(), np.float32(offset))
    return Matrix(np.ascontiguousarray(codes), scale, None, spec)
  if scale.dtype == np.uint8:
    top = found['.weight.nested_absmax'].read().repeat(BLOCK)[:len(scale)]
    scale = dynamic_numbers()[scale] * top + np.float32(offset)
  block = np.arange(O * G) * spec.group // size
  return Matrix(np.ascontiguousarray(codes), np.ascontiguousarray(scale[block].reshape(O, G).T),
                None, spec)


def writer(modules, floats, encoding):
  """The Writer of these modules; see `written`.

  Raises:
    InputError: a module that the format has no words for.
  """
  del encoding                                         # there is one
  first = modules[0].spec
  four = first.code in _TABLES
  for m in modules:
    s = m.spec
    m.must(s.code in _TABLES or (s.code, s.bits, s.group, s.tensor, s.static, s.symmetric) == (
        'int', 8, None, False, False, True), 'nf4, fp4, or eight bits by channel (w8a8, w8a16)')
    m.must((s.code, s.double, s.activation_bits) == (
        first.code, first.double, first.activation_bits), f'one scheme for all, here {first}')
    m.must(not m.ordered, 'inputs in their order')
    m.must(not four or (s.group in _BLOCKS and m.inputs % s.group == 0),
           f'blocks of {", ".join(map(str, _BLOCKS))} that divide the inputs')
    m.must(not four or m.nested == s.double, 'double scales of its own kind')
  how = dict(quant_method=NAME, load_in_4bit=four, load_in_8bit=not four,
             llm_int8_threshold=0. if first.activation_bits else _THRESHOLD,
             llm_int8_skip_modules=floats, llm_int8_has_fp16_weight=False)
  if four:
    how |= dict(bnb_4bit_quant_type=first.code, bnb_4bit_use_double_quant=first.double,
                bnb_4bit_compute_dtype=str(modules[0].dtype), bnb_4bit_quant_storage='uint8')
  return Writer(how, _layout, _encode)


def _layout(m):
  """{suffix: (shape, dtype)} of a module."""
  byte, wide, count = np.dtype(np.uint8), np.dtype(np.float32), m.inputs * m.outputs
  if m.spec.code == 'int':
    return {'.weight': ((m.outputs, m.inputs), np.dtype(np.int8)), '.SCB': ((m.outputs,), wide),
            '.weight_format': ((), byte)}
  blocks = count // m.spec.group
  out = {'.weight': ((count // 2, 1), byte), '.weight.quant_map': ((16,), wide),
         '.weight.absmax': ((blocks,), byte if m.spec.double else wide)}
  if m.spec.double:
    out |= {'.weight.nested_absmax': ((-(-blocks // BLOCK),), wide),
            '.weight.nested_quant_map': ((256,), wide)}
  return out | {f'{_STATE}{m.spec.code}': ((len(_json(m)),), byte)}


def _json(m):
  """The JSON of quant_state, uint8."""
  state = dict(quant_type=m.spec.code, blocksize=m.spec.group, dtype=str(m.dtype),
               shape=[m.outputs, m.inputs])
  if m.spec.double:
    state |= dict(nested_blocksize=BLOCK, nested_dtype='float32',
                  nested_offset=float(m.scales().offset))
  return np.frombuffer(json.dumps(state).encode(), np.uint8)


def _largest(scale):
  """SCB that reads as these scales: a float16's value, which it is of theirs, or the nearest."""
  top = scale * np.float32(127)
  near = (top.astype(np.float16).astype(np.float32), top, np.nextafter(top, np.float32(0)))
  out = np.nextafter(top, np.float32(np.inf))
  for one in near[::-1]:
    out = np.where(one * _UNIT == scale, one, out)
  return out


def _encode(m, matrix):
  """{suffix: array} of a module."""
  rows = matrix.codes.T
  if m.spec.code == 'int':
    return {'.weight': rows, '.SCB': _largest(matrix.scale[0].astype(np.float32)),
            '.weight_format': np.uint8(0)}
  flat, scale = rows.reshape(-1), matrix.scale
  out = {'.weight': (flat[::2] << 4 | flat[1::2])[:, None],
         '.weight.quant_map': _TABLES[m.spec.code]}
  if m.spec.double:
    out |= {'.weight.absmax': scale.codes.T.reshape(-1), '.weight.nested_absmax': scale.top,
            '.weight.nested_quant_map': dynamic_numbers()}
  else:
    out['.weight.absmax'] = scale.T.reshape(-1)
  return out | {f'{_STATE}{m.spec.code}': _json(m)}
