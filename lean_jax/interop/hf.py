"""Hugging Face checkpoints: folders of config.json and safetensors."""
import contextlib
import dataclasses
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
from lean_jax.models.decoder import Decoder
from lean_jax.models.families import family_of

# Constants that older checkpoints hold beside the parameters.
_CONSTANTS = re.compile(r'.*\.(rotary_emb\.inv_freq|masked_bias)')
_DTYPES = ('float32', 'bfloat16', 'float16')
_STORED = ('F64', 'F32', 'F16', 'BF16')
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def load_hf(folder, *, dtype=None):
  """Reads a model, one tensor at a time.

  Args:
    folder: has config.json and model.safetensors, or the files of model.safetensors.index.json.
    dtype: of parameters, activations and products; None is 'float32'.

  Returns:
    (family, config, params, config.json as a dict); params are for `Decoder(config)`.

  Raises:
    InputError: files are absent or damaged, the model computes what we do not, or its tensors
      are not those of its config.
  """
  folder, dtype = pathlib.Path(folder), dtype or 'float32'
  if dtype not in _DTYPES:
    raise InputError(f'dtype {dtype!r}; give one of {", ".join(_DTYPES)}')
  if not folder.is_dir():
    raise InputError(f'{str(folder)!r} is no folder; give the folder of a Hugging Face model')
  hf = tensors.read_json(folder / 'config.json')
  family = family_of(hf)
  config = dataclasses.replace(family.from_hf(hf), dtype=dtype)
  with contextlib.ExitStack() as stack:
    stored = tensors.opened(folder, stack)
    with tensors.readable(folder):
      check(folder, family, config, stored)

      def one(path, leaf):
        shape = meta.unbox(leaf).shape
        value = read(stored, *family.names[tree.name(path)], shape, dtype)
        return leaf.replace_boxed(value) if tree.is_weight(leaf) else value
      params = jax.tree_util.tree_map_with_path(one, abstract(config), is_leaf=tree.is_weight)
  return family, config, params, hf


def save_hf(folder, family, config, params, hf_config=None):
  """Writes config.json and model.safetensors, with the dense value of each weight in its dtype.

  Args:
    folder: exists; what it has of these files is overwritten.
    family, config: as from `load_hf`.
    params: of `Decoder(config)`, of any kinds of weights.
    hf_config: where the ids of special tokens are taken from; None writes none.

  Raises:
    InputError: params are not those of the config, or the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  odd = misfits(config, params)
  if odd:
    raise InputError(f'{tensors.listed(odd)}: not as in a {family.model_type} of this config; '
                     'merge or remove what was added, or give the config of these parameters')
  out = {}
  for path, leaf in leaves(params):
    name, transposed = family.names[path]
    value = np.asarray(meta.unbox(leaf))
    layers = [*value] if '{}' in name else [value]
    for k, x in enumerate(layers):
      out[name.format(k)] = np.ascontiguousarray(x.T if transposed else x)
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
  hf = family.to_hf(config) | {k: (hf_config or {}).get(k) for k in _TOKENS}
  text = json.dumps(hf | dict(torch_dtype=str(dtype)), indent=2)
  pathlib.Path(folder, 'config.json').write_text(text + '\n', encoding='utf-8')


def abstract(config):
  """The params of `Decoder(config)`, with jax.ShapeDtypeStruct for arrays."""
  return jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), int))['params']


def leaves(params):
  """[(name, weight or array)], in the tree's order."""
  found = jax.tree_util.tree_leaves_with_path(params, is_leaf=tree.is_weight)
  return [(tree.name(path), leaf) for path, leaf in found]


def misfits(config, params):
  """The names that params lack, have beyond those of `Decoder(config)`, or have in other shapes."""
  found, wanted = shapes(params), shapes(abstract(config))
  return [n for n in wanted | found if found.get(n) != wanted.get(n)]


def shapes(params):
  """{name: shape of the dense value}."""
  return {name: tuple(leaf.shape) for name, leaf in leaves(params)}


def check(folder, family, config, stored):
  """Raises InputError if the tensors in a folder are not those of its config."""
  wanted = {}
  for path, shape in shapes(abstract(config)).items():
    name, transposed = family.names[path]
    count, shape = (shape[0], shape[1:]) if '{}' in name else (1, shape)
    wanted |= {name.format(k): shape[::-1] if transposed else shape for k in range(count)}
  head, embedding = (family.names[path][0] for path in ('head/kernel', 'embed/table'))
  repeated = {head} if config.tied else set()
  missing = [n for n in wanted if n not in stored]
  extra = [n for n in stored
           if n not in wanted and n not in repeated and not _CONSTANTS.fullmatch(n)]
  slices = {n: stored[n].get_slice(n) for n in wanted if n in stored}
  shape = {n: tuple(s.get_shape()) for n, s in slices.items()}
  wrong = [f'{n} {shape[n]} instead of {wanted[n]}' for n in slices if shape[n] != wanted[n]]
  kinds = [f'{n} {s.get_dtype()}' for n, s in slices.items() if s.get_dtype() not in _STORED]
  faults = {'missing': missing, 'unknown': extra, 'misshapen': wrong, 'not float': kinds}
  faults = [f'{what} {tensors.listed(names)}' for what, names in faults.items() if names]
  if faults:
    raise InputError(f'{str(folder)!r} does not fit its config.json: {"; ".join(faults)}; '
                     'give the files of one model')
  if config.tied and head in stored and not np.array_equal(
      stored[head].get_tensor(head), stored[embedding].get_tensor(embedding)):
    raise InputError(f'{str(folder)!r} has a {head} that differs from {embedding}, though its '
                     'config.json ties them; set tie_word_embeddings to false')


def read(stored, name, transposed, shape, dtype):
  """The array of one weight, its layers stacked."""
  def turned(name):
    x = stored[name].get_tensor(name)
    return x.T if transposed else x

  if '{}' not in name:
    return jnp.asarray(turned(name).astype(dtype))
  out = np.empty(shape, dtype)
  for k in range(len(out)):
    out[k] = turned(name.format(k))
  return jnp.asarray(out)
