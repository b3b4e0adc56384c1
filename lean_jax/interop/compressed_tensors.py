"""compressed-tensors, the format of llm-compressor and vLLM: integers of 2 to 8 bits.

Of a matrix [O I] of symmetric codes q in b bits, or of codes around a signed zero point z
(github.com/vllm-project/compressed-tensors, compressors/pack_quantized and naive_quantized):

  pack-quantized    weight_packed int32 [O ceil(I b / 32)]: q + 2^(b-1), one stream of bits a row;
                    weight_scale [O G]; weight_shape int64 [2]; weight_zero_point int32
                    [ceil(O b / 32) G], z + 2^(b-1) in streams along O
  int-quantized,    weight int8 [O I], weight_scale [O G], weight_zero_point int8 [O G]; input_scale
  naive-quantized   [1] of activations in a calibrated range

Values are (q - z) * scale. Activations in eight bits have their own range a token (or input_scale).
There its step is max|x| / 127.5, here max|x| / 127: products differ by a part in 255 of a step.
"""
import functools
import math
import re

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop import bits, rounded
from lean_jax.interop.rounded import Matrix, Rounded, chosen, section
from lean_jax.interop.tensors import FLOATS
from lean_jax.interop.written import Writer
from lean_jax.quantization.spec import QuantSpec

NAME = 'compressed-tensors'
ENCODINGS = ()
_BITS = (2, 3, 4, 5, 6, 8)
_PACKED, _INT, _MIXED = 'pack-quantized', 'int-quantized', 'mixed-precision'


def read(found, how):
  """{name: Tensor or Rounded} of {name: Tensor} and quantization_config.

  Raises:
    InputError: a scheme that is not computed here, or tensors that do not fit it.
  """
  if how.get('kv_cache_scheme') or section(how, 'sparsity_config').get(
      'format', 'dense') != 'dense':
    raise InputError('quantization_config rounds keys and values, or leaves out zeros '
                     '(kv_cache_scheme, sparsity_config), which lean_jax does not read; give a '
                     'checkpoint without')
  groups, out = section(how, 'config_groups'), dict(found)
  groups = [(_targets(section(groups, k)), groups[k]) for k in groups if groups[k]]
  for module in rounded.modules(found, '.weight_scale'):
    group = _group_of(module, groups)
    packed = f'{module}.weight_packed' in found
    out[f'{module}.weight'] = _rounded(out, module, group, packed)
  return out


def _targets(group):
  """Patterns of the names of a group's modules, and whether it has all that are left.

  Raises:
    InputError: its targets are no names and no regular expressions.
  """
  found = group.get('targets')
  if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
    raise InputError(f'quantization_config has targets = {found!r:.80}, expected names; download '
                     'config.json again')
  try:
    named = [re.compile(t[3:] if t.startswith('re:') else rf'(.*\.)?{re.escape(t)}$')
             for t in found]
  except re.error as error:
    raise InputError(f'quantization_config has targets = {found!r:.80} ({error}); download '
                     'config.json again') from error
  return named, 'Linear' in found or 'Embedding' in found


def _group_of(module, groups):
  """The config group that a module is of: by its name first, then by its class."""
  for (named, _), group in groups:
    if any(p.match(module) for p in named):
      return group
  for (_, rest), group in groups:
    if rest:
      return group
  raise InputError(f'{module} is rounded, and no config group of quantization_config has it as a '
                   'target; download config.json again')


def _spec(group, module, inputs):
  """The QuantSpec of a config group."""
  w, x = section(group, 'weights'), section(group, 'input_activations')
  chosen(w, 'type', ('int',), 'int')
  width = chosen(w, 'num_bits', _BITS, 8)
  size = w.get('group_size')
  strategy = chosen(w | dict(strategy=w.get('strategy') or (
      'tensor' if size is None else 'channel' if size == -1 else 'group')), 'strategy',
                    ('tensor', 'channel', 'group'))
  size = rounded.group_of(w, inputs) if strategy == 'group' else None
  symmetric, static = w.get('symmetric', True) is True, False
  if group.get('output_activations'):
    raise InputError(f'{module} rounds its outputs (output_activations), which lean_jax does not; '
                     'give a checkpoint without')
  if x:
    same = [x.get('type', 'int'), x.get('num_bits', 8), x.get('symmetric', True)]
    static = not x.get('dynamic')
    allowed = ('tensor',) if static else ('token',)
    if same != ['int', 8, True] or not symmetric or (x.get('strategy') or 'tensor') not in allowed:
      raise InputError(f'{module} has input_activations = {x}, and lean_jax reads symmetric ones '
                       'in 8 bits, of each token, or of a static tensor, with symmetric weights; '
                       'give a checkpoint with such')
  if static and width != 8:
    raise InputError(f'{module} has {width} bits and static activations, which lean_jax reads with '
                     '8 bits; give a checkpoint with dynamic ones')
  return QuantSpec(width, size, 8 if x else None, symmetric, tensor=strategy == 'tensor',
                   static=static)


def _rounded(out, module, group, packed):
  """Takes the tensors of a module out of `out`, as a Rounded."""
  key = '.weight_packed' if packed else '.weight'
  tensor = out.get(module + key)
  if tensor is None or len(tensor.shape) != 2:
    raise InputError(f'the checkpoint lacks {module}{key}, or it is no matrix; download it again')
  O, I = tensor.shape
  if packed:
    wanted = {'.weight_shape': (('I64', 'I32'), (2,))}
    shape = rounded.taken(out, module, wanted)['.weight_shape'].read().tolist()
    if shape[0] != O or not 0 < shape[1] <= 16 * I:
      raise InputError(f'{module}.weight_shape is {shape}, and {module}{key} {tensor.shape}; '
                       'download it again')
    I = shape[1]
  spec = _spec(group, module, I)
  found = rounded.taken(out, module, _wanted(spec, I, O, packed, out, module))
  return Rounded(f'{module}.weight', I, O, spec,
                 functools.partial(_read, found, module, spec, I, O, packed))


def _wanted(spec, I, O, packed, out, module):
  """{suffix: (kinds, shape)} of a module's tensors."""
  G = -(-I // spec.group) if spec.group else 1
  scale = (1,) if spec.tensor else (O, G)
  wanted = {'.weight_scale': (tuple(FLOATS), scale)}
  if packed:
    wanted['.weight_packed'] = (('I32',), (O, math.ceil(I * spec.bits / 32)))
  else:
    wanted['.weight'] = (('I8',), (O, I))
  if not spec.symmetric:
    streams = packed and not spec.tensor
    wanted['.weight_zero_point'] = (
        (('I32',), (math.ceil(O * spec.bits / 32), G)) if streams else (('I8',), scale))
  if spec.static:
    wanted['.input_scale'] = (tuple(FLOATS), (1,))
  if f'{module}.weight_g_idx' in out:
    wanted['.weight_g_idx'] = (('I32', 'I64'), (I,))
  return wanted


def _read(found, module, spec, I, O, packed):
  """The Matrix of tensors."""
  half = np.uint8(2 ** (spec.bits - 1))
  if packed:
    codes = bits.from_words(found['.weight_packed'].read(), spec.bits, I).T
    codes = (codes - half).view(np.int8) if spec.symmetric else codes
  else:
    codes = found['.weight'].read().T
    codes = codes if spec.symmetric else codes.view(np.uint8) + half
  scale, zero = found['.weight_scale'].read(), None
  if not spec.symmetric:
    zero = found['.weight_zero_point'].read()
    zero = (bits.from_words(zero.T, spec.bits, O) if zero.dtype == np.int32
            else zero.reshape(scale.reshape(-1, scale.shape[-1]).shape).T.view(np.uint8) + half)
  order = None
  if '.weight_g_idx' in found:
    groups = found['.weight_g_idx'].read()
    if not np.all(groups == -1):                       # what it is where it was never set
      order = rounded.ordered(groups, spec.group or I, module)
      codes = codes if order is None else codes[order]
  step = found['.input_scale'].read().astype(np.float32)[0] if spec.static else None
  return Matrix(np.ascontiguousarray(codes), np.ascontiguousarray(
      scale.reshape(1, 1) if spec.tensor else scale.T), zero, spec, order, step)


def writer(modules, floats, encoding):
  """The Writer of these modules; see `written`.

  Raises:
    InputError: a module that the format has no words for.
  """
  del encoding                                         # there is one
  for m in modules:
    m.must(m.spec.code == 'int' and m.spec.bits in _BITS, 'integers of 2, 3, 4, 5, 6 or 8 bits')
    m.must(not m.spec.group or m.inputs % m.spec.group == 0, 'groups that divide the inputs')
    m.must(not m.transposed, "Linear modules, and this model's are Conv1D")
    m.must(not m.ordered, 'inputs in their order')
    m.must(not m.zero or m.zero.kind == 'u', 'zero points that are whole numbers')
    m.must(not (m.spec.tensor and m.zero), 'a zero point of each group')
  specs = list(dict.fromkeys(m.spec for m in modules))
  names = lambda spec: [m.name for m in modules if m.spec == spec]
  groups = {f'group_{k}': _described(spec, ['Linear'] if len(specs) == 1 else names(spec))
            for k, spec in enumerate(specs)}
  forms = {group['format'] for group in groups.values()}
  how = dict(quant_method=NAME, format=forms.pop() if len(forms) == 1 else _MIXED,
             quantization_status='compressed', config_groups=groups, ignore=floats,
             kv_cache_scheme=None)
  return Writer(how, _layout, _encode)


def _described(spec, targets):
  """The config group of a QuantSpec."""
  strategy = 'tensor' if spec.tensor else 'group' if spec.group else 'channel'
  weights = dict(num_bits=spec.bits, type='int', symmetric=spec.symmetric, strategy=strategy,
                 group_size=spec.group, dynamic=False)
  x = None
  if spec.activation_bits:
    x = dict(num_bits=8, type='int', symmetric=True, dynamic=not spec.static, group_size=None,
             strategy='tensor' if spec.static else 'token')
  return dict(targets=targets, weights=weights, input_activations=x, output_activations=None,
              format=_form(spec))


def _form(spec):
  return _INT if spec.activation_bits and spec.bits == 8 else _PACKED


def _layout(m):
  """{suffix: (shape, dtype)} of a module."""
  spec, packed = m.spec, _form(m.spec) == _PACKED
  G = -(-m.inputs // spec.group) if spec.group else 1
  out = {'.weight_packed': ((m.outputs, math.ceil(m.inputs * spec.bits / 32)), np.dtype('<i4')),
         '.weight_shape': ((2,), np.dtype('<i8'))} if packed else {
             '.weight': ((m.outputs, m.inputs), np.dtype(np.int8))}
  # Never narrower than the dense value, whose dtype transformers gives to the scale.
  out['.weight_scale'] = ((1,) if spec.tensor else (m.outputs, G), np.promote_types(
      m.scale, m.dtype))
  if not spec.symmetric:
    out['.weight_zero_point'] = ((math.ceil(m.outputs * spec.bits / 32), G), np.dtype('<i4'))
  if spec.static:
    out['.input_scale'] = ((1,), np.dtype(np.float32))
  return out


def _encode(m, matrix):
  """{suffix: array} of a module."""
  spec, half = m.spec, np.uint8(2 ** (m.spec.bits - 1))
  scale = np.asarray(matrix.scale.astype(np.float32) if m.nested else matrix.scale)
  out = {'.weight_scale': scale.reshape(-1) if spec.tensor else scale.T}
  if _form(spec) == _INT:
    out['.weight'] = matrix.codes.T
  else:
    codes = matrix.codes.T.view(np.uint8) + half if spec.symmetric else matrix.codes.T
    out['.weight_packed'] = bits.words(codes, spec.bits)
    out['.weight_shape'] = np.array([m.outputs, m.inputs])
  if not spec.symmetric:
    out['.weight_zero_point'] = bits.words(matrix.zero.astype(np.uint8), spec.bits).T
  if spec.static:
    out['.input_scale'] = matrix.input_scale.reshape(1)
  return out

