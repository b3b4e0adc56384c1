"""GGUF models of Llama's kind: opened as they are rounded, and written."""
import contextlib
import dataclasses
import functools
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop import gguf_codes, gguf_file, gguf_tokenizer
from lean_jax.interop.hf import abstract, shapes
from lean_jax.interop.names import pieces, place
from lean_jax.interop.tensors import listed
from lean_jax.models.families import family_of
from lean_jax.models.segments import configured
from lean_jax.weights import Quantized

DTYPES = ('float32', 'bfloat16', 'float16')
# general.architecture: model_type, and whether rows of queries and keys are in pairs (2k, 2k+1).
ARCHITECTURES = dict(llama=('llama', True), mistral=('mistral', True), qwen2=('qwen2', False))
FREQUENCIES = 'rope_freqs.weight'
# How Hugging Face calls a tensor, and GGUF.
_NAMES = (
    (r'model\.embed_tokens\.(\w+)', r'token_embd.\1'), (r'model\.norm\.(\w+)', r'output_norm.\1'),
    (r'lm_head\.(\w+)', r'output.\1'),
    (r'model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)', r'blk.\1.attn_\2.\3'),
    (r'model\.layers\.(\d+)\.self_attn\.o_proj\.(\w+)', r'blk.\1.attn_output.\2'),
    (r'model\.layers\.(\d+)\.mlp\.(\w+)_proj\.(\w+)', r'blk.\1.ffn_\2.\3'),
    (r'model\.layers\.(\d+)\.input_layernorm\.(\w+)', r'blk.\1.attn_norm.\2'),
    (r'model\.layers\.(\d+)\.post_attention_layernorm\.(\w+)', r'blk.\1.ffn_norm.\2'))


def theirs(name):
  """GGUF's name of a tensor of a Hugging Face checkpoint."""
  for ours, new in _NAMES:
    if re.fullmatch(ours, name):
      return re.sub(ours, new, name)
  raise KeyError(name)


def file_in(where):
  """The GGUF file at a path: it, or the only one of a folder without config.json; else None.

  Raises:
    InputError: the folder has several.
  """
  path = pathlib.Path(where)
  if path.suffix == '.gguf' and not path.is_dir():
    return path
  if not path.is_dir() or (path / 'config.json').exists():
    return None
  found = sorted(path.glob('*.gguf'))
  if len(found) > 1:
    raise InputError(f'{str(path)!r} has {listed([f.name for f in found])}; name one of them')
  return found[0] if found else None


def load_gguf(path, *, dtype=None, scan_layers=None, shardings=None):
  """Reads a model; what the file rounds are `Quantized` weights of the same codes and scales.

  Args:
    path: of the file.
    dtype: of other parameters and of activations; None is 'float32'.
    scan_layers: whether layers are stacked; None stacks them where all have the same types.
    shardings: None, or a function from the params to a tree of shardings.

  Returns:
    (family, config, params, tokenizer, what config.json would say).

  Raises:
    InputError: the file is damaged, or a model or a tokenizer that lean_jax does not read.
  """
  dtype = dtype or 'float32'
  if dtype not in DTYPES:
    raise InputError(f'dtype {dtype!r}; give one of {", ".join(DTYPES)}')
  with contextlib.ExitStack() as stack:
    keys, found = gguf_file.opened(path, stack)
    hf, paired = described(keys, found, path)
    tokenizer = gguf_tokenizer.read(keys, path)
    family = family_of(hf)
    config = configured(family.from_hf(hf), dtype=dtype)
    if tokenizer.size > config.vocabulary:
      raise InputError(f'{str(path)!r} has {tokenizer.size} tokens and a table of '
                       f'{config.vocabulary}; download it again')
    mixed = mixed_types(found)
    if mixed and scan_layers:
      raise InputError(f'{str(path)!r} has layers of several types ({listed(mixed)}), which cannot '
                       'be stacked; load it with scan_layers=False, or None')
    config = configured(config, scan_layers=not mixed if scan_layers is None else scan_layers)
    check(path, family, config, found)
    params, odd = _read(family, config, found, dtype, paired)
  if odd:
    warnings.warn(f'{str(path)!r} has values that are no finite {dtype} in {listed(sorted(odd))}; '
                  'what it computes cannot be trusted', stacklevel=3)
  if shardings is not None:
    params = jax.device_put(params, shardings(params))
  return family, config, params, tokenizer, hf


def described(keys, found, path):
  """What config.json would say, and whether rows of queries and keys are in pairs.

  Raises:
    InputError: another architecture, or keys that are absent or not of these tensors.
  """
  name = keys.get('general.architecture')
  if not isinstance(name, str) or name not in ARCHITECTURES:
    raise InputError(f'{str(path)!r} is of architecture {name!r}; lean_jax reads: '
                     f'{", ".join(ARCHITECTURES)}')
  number = functools.partial(_number, keys, name, path)
  width, layers, heads = (number(k) for k in (
      'embedding_length', 'block_count', 'attention.head_count'))
  groups = number('attention.head_count_kv', heads)
  head = number('attention.key_length', width // heads or 1)
  hidden = number('feed_forward_length')
  vocabulary = _fitting(found, path, width, layers, dict(
      attn_q=heads * head, attn_k=groups * head, attn_v=groups * head, ffn_up=hidden))
  asked = {k: keys[k] for k in (f'{name}.rope.dimension_count', f'{name}.attention.value_length')
           if keys.get(k, head) != head}
  if keys.get(f'{name}.expert_count') or asked:
    raise InputError(f'{str(path)!r} has experts, or heads in parts ({asked}), which lean_jax does '
                     'not read from GGUF; give its Hugging Face checkpoint')
  model, paired = ARCHITECTURES[name]
  window = keys.get(f'{name}.attention.sliding_window')
  if window:
    model = dict(llama='mistral').get(model, model)
  hf = dict(
      model_type=model, vocab_size=vocabulary, hidden_size=width,
      num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
      head_dim=head, intermediate_size=hidden, max_position_embeddings=number('context_length'),
      rms_norm_eps=number('attention.layer_norm_rms_epsilon', 1e-5, float),
      tie_word_embeddings='output.weight' not in found,
      rope_theta=number('rope.freq_base', 10_000., float),
      rope_scaling=scaling(keys, name, found, path))
  if model == 'mistral':
    hf['sliding_window'] = number('attention.sliding_window') if window else None
  if model == 'llama':
    hf |= dict(attention_bias='blk.0.attn_q.bias' in found, mlp_bias='blk.0.ffn_up.bias' in found)
  return hf | {f'{kind}_token_id': keys.get(f'tokenizer.ggml.{kind}_token_id')
               for kind in ('bos', 'eos')}, paired


def _number(keys, architecture, path, key, default=None, kind=int):
  """A positive number of an architecture's keys; InputError where it is none."""
  value = keys.get(f'{architecture}.{key}', default)
  if isinstance(value, list) and value and len(set(value)) == 1:       # the same of all layers
    value = value[0]
  if type(value) not in (int, kind) or not 0 < value < 1 << 31:
    raise gguf_file.damaged(path, f'{architecture}.{key} is {value!r:.80}, expected a positive '
                            f'{kind.__name__}')
  return value if kind is int else float(str(np.float32(value)))       # 1e-5, and not its float32


def _fitting(found, path, width, layers, rows):
  """The vocabulary, if tensors have the sizes that keys say: before anything is made of these."""
  shape = lambda name: found[name].shape if name in found else (0,)
  wanted = {f'blk.0.{n}.weight': (k, width) for n, k in rows.items()}
  wanted['token_embd.weight'] = (*shape('token_embd.weight')[:1], width)
  odd = [f'{n} {shape(n)} instead of {s}' for n, s in wanted.items() if shape(n) != s]
  if layers > len(found) or odd:
    raise gguf_file.damaged(path, f'its keys do not fit {listed(odd)}' if odd else
                            f'its keys say {layers} layers, it has {len(found)} tensors')
  return wanted['token_embd.weight'][0]


def scaling(keys, name, found, path):
  """rope_scaling of config.json; factors of each frequency (Llama 3.1's) are LongRoPE's."""
  kind = keys.get(f'{name}.rope.scaling.type', 'none')
  factor = keys.get(f'{name}.rope.scaling.factor', keys.get(f'{name}.rope.scale_linear', 1.))
  if FREQUENCIES in found and kind == 'none' and found[FREQUENCIES].kind == 'F32':
    factors = found[FREQUENCIES].read().view('<f4')[0].tolist()
    return dict(rope_type='longrope', short_factor=factors, long_factor=factors,
                attention_factor=1.)
  if kind not in ('none', 'linear') or FREQUENCIES in found:
    raise InputError(f'{str(path)!r} has positions scaled by {kind!r}, which lean_jax does not '
                     'read from GGUF; give its Hugging Face checkpoint')
  return dict(rope_type='linear', factor=factor) if kind == 'linear' or factor != 1 else None


def mixed_types(found):
  """The tensors of layers, without their numbers, that are not of one type in all."""
  types: dict[str, set[str]] = {}
  for name, tensor in found.items():
    types.setdefault(re.sub(r'^blk\.\d+\.', '', name), set()).add(tensor.kind)
  return [name for name, kinds in types.items() if len(kinds) > 1]


def check(path, family, config, found):
  """Raises InputError if the tensors of a file are not those of its keys."""
  names, wanted = family.names(config), {}
  for ours, shape in shapes(abstract(config)).items():
    key, layers = place(config, ours)
    wanted |= {theirs(name): names[key].tensor_shape(shape[len(at):])
               for name, at in pieces(names[key], layers, shape)}
  faults = {'missing': [n for n in wanted if n not in found],
            'unknown': [n for n in found if n not in wanted and n != FREQUENCIES],
            'misshapen': [f'{n} {found[n].shape} instead of {s}' for n, s in wanted.items()
                          if n in found and found[n].shape != s],
            'rounded': [n for n in wanted if n in found and len(wanted[n]) == 1
                        and found[n].kind not in gguf_codes.FLOATS]}
  faults = [f'{what} {listed(which)}' for what, which in faults.items() if which]
  if faults:
    raise InputError(f'{str(path)!r} does not fit its keys: {"; ".join(faults)}; download it again')


def _read(family, config, found, dtype, paired):
  """The params, and the names of tensors that are not finite."""
  names, odd = family.names(config), set()
  flat, structure = jax.tree_util.tree_flatten_with_path(abstract(config), is_leaf=tree.is_weight)

  def one(path, leaf):
    key, layers = place(config, tree.name(path))
    shape = meta.unbox(leaf).shape
    made_of = [found[theirs(name)] for name, _ in pieces(names[key], layers, shape)]
    order = None
    if paired and re.search(r'attention/[qk]/', key):
      order = halves_of_pairs(config.heads if '/q/' in key else config.groups, config.head_width)
    inner = shape[1:] if isinstance(layers, tuple) else shape
    each = [_one(t, names[key], leaf, inner, dtype, order, odd) for t in made_of]
    value = jax.tree.map(lambda *x: jnp.stack(x), *each) if isinstance(layers, tuple) else each[0]
    if isinstance(value, Quantized):
      return dataclasses.replace(value, dims=leaf.dims, axes=leaf.axes)
    return leaf.replace_boxed(value) if tree.is_weight(leaf) else value
  return structure.unflatten([one(*item) for item in flat]), odd


def _one(tensor, stored, leaf, shape, dtype, order, odd):
  """The array or the Quantized of one layer's tensor; its outputs in an order, if one is given."""
  raw = tensor.read()
  if tensor.kind in gguf_codes.FLOATS:
    value = raw.view(gguf_codes.FLOATS[tensor.kind]).reshape(tensor.shape)
    value = value if order is None else value[order]
    with np.errstate(over='ignore'):
      value = stored.read(value, shape).astype(jnp.dtype(dtype))
    if not np.isfinite(value.astype(np.float32)).all():
      odd.add(tensor.name)
    return jnp.asarray(value)
  parts = gguf_codes.parts(raw if order is None else raw[order], tensor.kind)
  if not all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(
      (parts.scale, parts.zero)) if x.dtype.kind == 'f'):
    odd.add(tensor.name)
  scale, zero = jax.tree.map(jnp.asarray, (parts.scale, parts.zero))
  return Quantized.from_codes(jnp.asarray(parts.codes), scale, zero, parts.spec, shape, dtype,
                              leaf.dims.replace('n', ''), leaf.axes[-2:])


def halves_of_pairs(heads, width):
  """Which of GGUF's rows each of ours is: ours rotate k with k + width / 2, theirs 2k with 2k + 1.
  """
  return np.arange(heads * width).reshape(heads, width // 2, 2).swapaxes(1, 2).reshape(-1)
