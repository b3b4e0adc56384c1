"""Models of Llama's kind written as GGUF: codes as they are, floats by the format's own package."""
import collections
import contextlib
import pathlib

import numpy as np

from lean_jax.errors import InputError
from lean_jax.files import replacing
from lean_jax.interop import gguf_tokenizer
from lean_jax.interop.gguf import ARCHITECTURES, FREQUENCIES, theirs
from lean_jax.interop.gguf_encode import BLOCK, SIZES, copied, encode, type_of
from lean_jax.interop.hf import leaves, misfits
from lean_jax.interop.names import gathered, written
from lean_jax.interop.rounded import matrix
from lean_jax.interop.tensors import listed
from lean_jax.interop.written import of_one
from lean_jax.models.families.layer_types import window
from lean_jax.nn.rope_scaling import Linear, Llama3, LongRope, plain
from lean_jax.weights import Quantized

# How each is called as the type of a whole file.
ENCODINGS = dict(F32='ALL_F32', F16='MOSTLY_F16', Q8_0='MOSTLY_Q8_0', Q4_0='MOSTLY_Q4_0',
                 Q4_1='MOSTLY_Q4_1', Q5_0='MOSTLY_Q5_0', Q5_1='MOSTLY_Q5_1',
                 MXFP4='MOSTLY_MXFP4_MOE', Q4_K='MOSTLY_Q4_K_S', Q6_K='MOSTLY_Q6_K')
_BLOCK = 32                   # numbers, 256 of the K types; rows of other lengths are F16
_TOP = 65504                  # the greatest float16


def save_gguf(path, family, config, params, tokenizer, *, encoding='F16',
              overwrite=False):
  """Writes one file, whole or not at all, a tensor at a time.

  Args:
    path: of the file.
    family, config, params: of a Llama, Mistral or Qwen2, of any kinds of weights.
    tokenizer: of `data.tokenizer`.
    encoding: of matrices, one of `ENCODINGS`; F16 where rows are no whole blocks. Vectors are F32,
      and a matrix in codes that a type has is copied into it, its scales as float16.
    overwrite: whether the file may exist.

  Raises:
    InputError: the file exists, a model or a tokenizer that GGUF has no words for, numbers past
      float16, an encoding that is not written, or the package gguf is not there.
  """
  if encoding not in ENCODINGS:
    raise InputError(f'no encoding {encoding!r}; there are: {", ".join(ENCODINGS)}')
  path = pathlib.Path(path)
  if path.exists() and (not overwrite or path.is_dir()):
    raise InputError(f'{path} is there already; name another file, or allow overwriting')
  try:
    import gguf
  except ImportError as error:
    raise InputError("to write GGUF takes the package gguf; pip install 'lean-jax[gguf]'"
                     ) from error
  odd = misfits(config, params)
  if odd:
    raise InputError(f'{listed(odd)}: not as in a {family.model_type} of this config; merge or '
                     'remove what was added')
  keys, factors = architecture(family, config)
  words = gguf_tokenizer.written(tokenizer, config.vocabulary)
  params = dict(leaves(params))
  wanted, value = written(family, config, params)
  codes = in_codes(gathered(family, config, params), params)
  kinds = {n: codes[n][0] if n in codes else kind_of(shape, encoding)
           for n, (shape, _) in wanted.items()}
  most, _ = collections.Counter(k for n, k in kinds.items() if len(wanted[n][0]) > 1).most_common(
      1)[0]
  of = gguf.GGMLQuantizationType
  with replacing(path) as file:
    out = gguf.GGUFWriter(file.name, keys.pop('architecture'))
    out.add_name(path.stem)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_file_type(gguf.LlamaFileType[ENCODINGS[most]])
    _add_keys(out, f'{out.arch}.', keys)
    _add_keys(out, 'tokenizer.ggml.', words)
    if 'chat_template' in words:
      out.add_chat_template(words['chat_template'])
    if factors is not None:
      out.add_tensor_info(FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
    for n, (shape, _) in wanted.items():
      rows = gguf.quant_shape_to_byte_shape(shape, of[kinds[n]])
      out.add_tensor_info(theirs(n), rows, np.dtype(np.uint8), int(np.prod(rows)), of[kinds[n]])
    with contextlib.closing(out):
      out.write_header_to_file()
      out.write_kv_data_to_file()
      out.write_ti_data_to_file()
      if factors is not None:
        out.write_tensor_data(factors)
      for n in wanted:
        if n in codes:
          kind, read = codes[n]
          found = read()
          order = in_pairs(np.arange(found.codes.shape[1]), n, out.arch, config)
          out.write_tensor_data(copied(found, kind, n)[order])
          continue
        x = in_pairs(np.asarray(value(n), np.float32), n, out.arch, config)
        if kinds[n] != 'F32' and not np.abs(x).max() <= _TOP:
          raise InputError(f'{n} has numbers that are no finite float16; save with encoding F32')
        out.write_tensor_data(encode(x, kinds[n]) if kinds[n] in SIZES else
                              gguf.quants.quantize(x, of[kinds[n]]))


def in_codes(parts, params):
  """{tensor: (its type, a function that gives its `rounded.Matrix`)} of those that are copied."""
  out = {}
  for name, cut in parts.items():
    part, w = cut[0], params[cut[0].path]
    kind = type_of(w) if isinstance(w, Quantized) and len(cut) == 1 else None
    if kind:
      out[name] = kind, lambda w=w, part=part: matrix(of_one(w, part))
  return out


def kind_of(shape, encoding):
  """The type of a tensor."""
  if len(shape) == 1:
    return 'F32'
  block = BLOCK if encoding in SIZES else _BLOCK
  return encoding if encoding in ('F32', 'F16') or shape[-1] % block == 0 else 'F16'


def in_pairs(x, name, architecture, config):
  """A tensor with rows of queries and keys as its architecture rotates them."""
  which = next((w for w in 'qk' if f'self_attn.{w}_proj' in name), None)
  if which is None or not ARCHITECTURES[architecture][1]:
    return x
  heads = config.heads if which == 'q' else config.groups
  parts = x.reshape(heads, 2, config.head_width // 2, *x.shape[1:])
  return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(x.shape))


def architecture(family, config):
  """The keys of an architecture, and factors [K/2] of its frequencies, or None.

  Raises:
    InputError: GGUF, or llama.cpp, has no such model.
  """
  name = dict(llama='llama', mistral='llama', qwen2='qwen2').get(family.model_type)
  c, rope = config, config.attention.ropes[0] if config.attention.ropes else None
  if name is None:
    raise InputError(f'a {family.model_type} is not written as GGUF; lean_jax writes llama, '
                     "mistral and qwen2; save with format='hf'")
  scaling, near = rope.scaling, window(c)
  same = isinstance(scaling, LongRope) and scaling.short == scaling.long and scaling.amplitude == 1
  if c.mlp.activation != 'silu' or (near and name == 'qwen2') or not (
      scaling is None or isinstance(scaling, Linear | Llama3) or same):
    raise InputError('an activation, windows or positions that GGUF has no key for; save with '
                     "format='hf'")
  keys = {
      'architecture': name, 'vocab_size': c.vocabulary, 'context_length': c.context,
      'embedding_length': c.width, 'block_count': c.layers, 'feed_forward_length': c.hidden,
      'attention.head_count': c.heads, 'attention.head_count_kv': c.groups,
      'attention.key_length': c.head_width, 'attention.value_length': c.head_width,
      'attention.layer_norm_rms_epsilon': float(c.epsilon),
      'rope.dimension_count': c.head_width, 'rope.freq_base': float(rope.theta)}
  if near:
    keys['attention.sliding_window'] = near
  if isinstance(scaling, Linear):
    keys |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': float(scaling.factor)}
  if scaling is None or isinstance(scaling, Linear):
    return keys, None
  turned = scaling.frequencies(rope.theta, c.head_width, c.context)
  return keys, np.asarray(plain(rope.theta, c.head_width) / turned, np.float32)


def _add_keys(out, prefix, keys):
  add = {bool: out.add_bool, int: out.add_uint32, float: out.add_float32, str: out.add_string,
         list: out.add_array}
  for key, value in keys.items():
    if key != 'chat_template':
      add[type(value)](prefix + key, value)
