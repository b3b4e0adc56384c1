"""Hugging Face checkpoints: folders of config.json and safetensors."""
import contextlib
import dataclasses
import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.core import meta

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop import tensors
from lean_jax.models.families import family_of
from lean_jax.models.segments import located

_DTYPES = ('float32', 'bfloat16', 'float16')
_STORED = ('F64', 'F32', 'F16', 'BF16')
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
_FORCED = ('forced_bos_token_id', 'forced_eos_token_id')


def load_hf(folder, *, dtype=None, scan_layers=True):
  """Reads a model, one tensor at a time.

  Args:
    folder: has config.json and model.safetensors, or the files of model.safetensors.index.json.
    dtype: of parameters, activations and products; None is 'float32'.
    scan_layers: whether layers of one kind are stacked.

  Returns:
    (family, config, params, config.json as a dict); params are for `config.module`.

  Raises:
    InputError: files are absent or damaged, the model computes what we do not, or its tensors
      are not those of its config.
  """
  folder, dtype = pathlib.Path(folder), dtype or 'float32'
  if dtype not in _DTYPES:
    raise InputError(f'dtype {dtype!r}; give one of {", ".join(_DTYPES)}')
  if not folder.is_dir():
    raise InputError(f'{str(folder)!r} is no folder; give the folder of a Hugging Face model')
  hf = read_config(folder)
  family = family_of(hf)
  config = configured(family.from_hf(hf), dtype=dtype, scan_layers=scan_layers)
  with contextlib.ExitStack() as stack:
    stored = unprefixed(tensors.opened(folder, stack), family)
    with tensors.readable(folder):
      config = settled(family, config, stored)
      check(folder, family, config, stored)
      names = family.names(config)

      def one(path, leaf):
        key, layers = place(config, tree.name(path))
        value = read(stored, names[key], layers, meta.unbox(leaf).shape, dtype)
        return leaf.replace_boxed(value) if tree.is_weight(leaf) else value
      params = jax.tree_util.tree_map_with_path(one, abstract(config), is_leaf=tree.is_weight)
  return family, config, params, hf


def read_config(folder):
  """config.json, with what generation_config.json, if there is one, says of targets' tokens."""
  hf, path = tensors.read_json(folder / 'config.json'), folder / 'generation_config.json'
  if not path.exists():
    return hf
  given = tensors.read_json(path)
  here = {k: given[k] for k in (*_FORCED, 'decoder_start_token_id') if k in given}
  return hf | {k: None for k in _FORCED if k in hf} | here


def settled(family, config, stored):
  """The config, untied if the family's checkpoints tell and this one has a head of its own."""
  own = family.own_head and any(differs(stored, *pair) for pair in copies(family, config).items())
  return configured(config, tied=False) if own else config


def save_hf(folder, family, config, params, hf_config=None):
  """Writes config.json and model.safetensors, with the dense value of each weight in its dtype.

  Args:
    folder: exists; what it has of these files is overwritten.
    family, config: as from `load_hf`.
    params: of `config.module`, of any kinds of weights.
    hf_config: where the ids of special tokens are taken from; None writes none.

  Raises:
    InputError: params are not those of the config, or the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  odd = misfits(config, params)
  if odd:
    raise InputError(f'{tensors.listed(odd)}: not as in a {family.model_type} of this config; '
                     'merge or remove what was added, or give the config of these parameters')
  names, found = family.names(config), {}
  for path, leaf in leaves(params):
    key, layers = place(config, path)
    value, stored = np.asarray(meta.unbox(leaf)), names[key]
    for name, at in pieces(stored, layers, value.shape):
      found.setdefault(name, {})[stored.index] = (stored, stored.write(value[at]))
  out = {}
  for name, cut in found.items():
    stored = cut[0][0]
    out[name] = np.ascontiguousarray(stored.join([cut[k][1] for k in range(len(cut))]))
  try:
    # transformers 4 refuses a file that does not say that it is of PyTorch's layout.
    safetensors.numpy.save_file(out, folder / 'model.safetensors', metadata=dict(format='pt'))
    write_config(folder, family, config, hf_config,
                 jnp.result_type(*{x.dtype for x in out.values()}))
  except (OSError, safetensors.SafetensorError) as error:
    raise InputError(f'cannot write in {str(folder)!r} ({error}); free space or give another '
                     'folder') from error


def write_config(folder, family, config, hf_config=None, dtype='float32'):
  """Writes config.json: of the config, and the ids of special tokens in `hf_config`."""
  tokens = {k: (hf_config or {}).get(k) for k in _TOKENS}
  hf = tokens | family.to_hf(config)
  text = json.dumps(hf | dict(torch_dtype=str(dtype)), indent=2)
  pathlib.Path(folder, 'config.json').write_text(text + '\n', encoding='utf-8')


def configured(config, **settings):
  """The config with settings that concern each of its stacks: dtype, remat, scan_layers."""
  inner = {f.name: configured(value, **settings) for f in dataclasses.fields(config)
           if hasattr(value := getattr(config, f.name), 'scan_layers')}
  own = {f.name: settings[f.name] for f in dataclasses.fields(config) if f.name in settings}
  return dataclasses.replace(config, **own, **inner)


def abstract(config):
  """The params of `config.module`, with jax.ShapeDtypeStruct for arrays."""
  module = config.module
  tokens = {name: jax.ShapeDtypeStruct((1, 1), jnp.int32) for name in module.inputs}
  return jax.eval_shape(module.init, jax.random.key(0), **tokens)['params']


def leaves(params):
  """[(name, weight or array)], in the tree's order."""
  found = jax.tree_util.tree_leaves_with_path(params, is_leaf=tree.is_weight)
  return [(tree.name(path), leaf) for path, leaf in found]


def misfits(config, params):
  """The names that params lack, have beyond those of `config.module`, or have in other shapes."""
  found, wanted = shapes(params), shapes(abstract(config))
  return [n for n in wanted | found if found.get(n) != wanted.get(n)]


def shapes(params):
  """{name: shape of the dense value}."""
  return {name: tuple(leaf.shape) for name, leaf in leaves(params)}


def place(config, path):
  """`segments.located` in the stack of the model that a path is in: its key, and its layers."""
  for prefix, stack in sorted(config.stacks.items(), reverse=True):
    if path.startswith(prefix):
      key, layers = located(stack, path.removeprefix(prefix))
      return prefix + key, layers
  return path, None


def pieces(stored, layers, shape):
  """[(name of a tensor, where in our array it belongs)]: one for each layer and expert."""
  numbers = dict(layer=[((), layers)] if not isinstance(layers, tuple) else
                 [((k,), n) for k, n in enumerate(layers)])
  depth = 1 if isinstance(layers, tuple) else 0
  numbers['expert'] = ([((e,), e) for e in range(shape[depth])] if '{expert}' in stored.name
                       else [((), None)])
  return [(stored.name.format(layer=layer, expert=expert), a + b)
          for (a, layer), (b, expert) in itertools.product(*numbers.values())]


def unprefixed(stored, family):
  """Tensors by name, with the family's prefix where a checkpoint leaves it out everywhere."""
  if not family.prefix or any(name.startswith(family.prefix) for name in stored):
    return {name: (file, name) for name, file in stored.items()}
  both = {name: (file, name) for name, file in stored.items()}
  return both | {family.prefix + name: found for name, found in both.items()}


def check(folder, family, config, stored):
  """Raises InputError if the tensors in a folder are not those of its config."""
  names, wanted = family.names(config), {}
  for path, shape in shapes(abstract(config)).items():
    key, layers = place(config, path)
    for name, at in pieces(names[key], layers, shape):
      wanted[name] = names[key].tensor_shape(shape[len(at):])
  repeated = family.copies | copies(family, config)
  used = {stored[n][1] for n in (*wanted, *repeated) if n in stored}
  missing = [n for n in wanted if n not in stored and not re.fullmatch(family.optional, n)]
  extra = [n for n in sorted({n for _, n in stored.values()})
           if n not in used and not re.fullmatch(family.ignored, n)]
  slices = {n: stored[n][0].get_slice(stored[n][1]) for n in wanted if n in stored}
  shape = {n: tuple(s.get_shape()) for n, s in slices.items()}
  wrong = [f'{n} {shape[n]} instead of {wanted[n]}' for n in slices if shape[n] != wanted[n]]
  kinds = [f'{n} {s.get_dtype()}' for n, s in slices.items() if s.get_dtype() not in _STORED]
  faults = {'missing': missing, 'unknown': extra, 'misshapen': wrong, 'not float': kinds}
  faults = [f'{what} {tensors.listed(names)}' for what, names in faults.items() if names]
  if faults:
    raise InputError(f'{str(folder)!r} does not fit its config.json: {"; ".join(faults)}; '
                     'give the files of one model')
  for copy, original in repeated.items():
    if differs(stored, copy, original):
      reason = ('which lean_jax computes as one; give a model that shares them'
                if copy in family.copies else
                'though its config.json ties them; set tie_word_embeddings to false')
      raise InputError(f'{str(folder)!r} has a {copy} that differs from {original}, {reason}')


def copies(family, config):
  """{the output head of a checkpoint: the embeddings that it repeats}, of a tied model."""
  names = family.names(config)
  heads = [stored.name for key, stored in names.items() if key.endswith('head/kernel')]
  return dict.fromkeys(heads, names['embed/table'].name) if tied(config) else {}


def differs(stored, one, other):
  """Whether a checkpoint has two tensors and they are not equal."""
  found = [stored[n][0].get_tensor(stored[n][1]) for n in (one, other) if n in stored]
  return len(found) == 2 and not np.array_equal(*found)


def tied(config):
  """Whether the output head is the embedding's transpose."""
  return getattr(config, 'tied', False)


def read(stored, where, layers, shape, dtype):
  """The array of one weight, its layers and experts stacked."""
  found = pieces(where, layers, shape)
  out = np.empty(shape, dtype)
  for name, at in found:
    if name not in stored:                  # one of the family's optional ones
      out[at] = 0
      continue
    file, actual = stored[name]
    out[at] = where.read(file.get_tensor(actual), shape[len(at):])
  return jnp.asarray(out)
