"""Hugging Face checkpoints: folders of config.json and safetensors."""
import contextlib
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop import formats, rounded, shards, tensors
from lean_jax.interop.names import check, copies, differs, pieces, place, unprefixed, written
from lean_jax.interop.streaming import filled
from lean_jax.interop.written import in_format
from lean_jax.models.families import family_of
from lean_jax.models.segments import configured
from lean_jax.weights.beside import without_beside

_DTYPES = ('float32', 'bfloat16', 'float16')
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
_FORCED = ('forced_bos_token_id', 'forced_eos_token_id')


def load_hf(folder, *, dtype=None, scan_layers=None, shardings=None):
  """Reads a model, a block of a tensor at a time, each array to where it will live.

  What a format of `formats` has rounded is a Quantized weight of the same codes and scales. Warns
  of tensors with a NaN or an infinity.

  Args:
    folder: has config.json and model.safetensors, or the files of model.safetensors.index.json.
    dtype: of parameters, activations and products; None is 'float32'.
    scan_layers: whether layers of one kind are stacked; None stacks them where all are rounded
      alike.
    shardings: one for all arrays, a tree of them, or a function from the tree of
      ShapeDtypeStructs (of a rounded weight, from its arrays) to such a tree; JAX's default device
      if None.

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
  config = configured(family.from_hf(formats.floats(hf)), dtype=dtype)
  with contextlib.ExitStack() as stack:
    stored = unprefixed(formats.opened(tensors.opened(folder, stack), hf), family)
    mixed = rounded.mixed(stored)
    if mixed and scan_layers:
      raise InputError(f'{str(folder)!r} has layers that are not rounded alike '
                       f'({tensors.listed(mixed)}), which cannot be stacked; load it with '
                       'scan_layers=False, or None')
    scan_layers = not mixed if scan_layers is None else scan_layers
    config = configured(config, scan_layers=scan_layers)
    with tensors.readable(folder):
      config = settled(family, config, stored)
      like = abstract(config)
      stored = rounded.oriented(family, config, shapes(like), stored)
      check(folder, family, config, shapes(like), stored)
      params, odd = read(family, config, like, stored, dtype, shardings)
  if odd:
    warnings.warn(f'{str(folder)!r} has values that are no finite {dtype} in '
                  f'{tensors.listed(sorted(odd))}; what it computes cannot be trusted',
                  stacklevel=2)
  return family, config, params, hf


def read(family, config, like, stored, dtype, shardings):
  """The params shaped as `like`, and the names of the tensors that are not finite."""
  names, odd = family.names(config), set()
  where = shardings(like) if callable(shardings) else shardings
  found, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=tree.is_weight)
  where = [None] * len(found) if where is None else jax.tree.leaves(
      jax.tree.broadcast(where, like))

  def one(path, leaf, sharding):
    key, layers = place(config, tree.name(path))
    shape = meta.unbox(leaf).shape
    made_of = [(stored.get(name), at) for name, at in pieces(names[key], layers, shape)]
    if any(isinstance(tensor, rounded.Rounded) for tensor, _ in made_of):
      value = rounded.weight(tree.name(path), leaf, names[key], made_of, dtype, odd)
      return jax.device_put(value, shardings(value) if callable(shardings) else sharding)
    value = filled(shape, names[key].dtype or dtype, sharding, names[key], made_of, odd)
    return leaf.replace_boxed(value) if tree.is_weight(leaf) else value
  return structure.unflatten([one(*leaf, to) for leaf, to in zip(found, where)]), odd


def read_config(folder):
  """config.json, with what generation_config.json says of tokens that begin and end a text."""
  hf, path = tensors.read_json(folder / 'config.json'), folder / 'generation_config.json'
  if not path.exists():
    return hf
  given = tensors.read_json(path)
  here = {k: given[k] for k in (*_FORCED, 'decoder_start_token_id', 'eos_token_id')
          if k in given}
  return hf | {k: None for k in _FORCED if k in hf} | here


def settled(family, config, stored):
  """The config as the tensors tell: untied where the family's may have a head of their own."""
  config = family.settle(config, stored)
  own = family.own_head and any(differs(stored, *pair) for pair in copies(family, config).items())
  return configured(config, tied=False) if own else config


def save_hf(folder, family, config, params, hf_config=None, *, max_shard_size='5GB', form=None,
            encoding=None):
  """Writes config.json and safetensors, with the dense value of each weight in its dtype.

  One tensor after the other: there is never a second copy of the model.

  Args:
    folder: exists; what it has of these files is overwritten.
    family, config: as from `load_hf`.
    params: of `config.module`, of any kinds of weights.
    hf_config: where the ids of special tokens are taken from; None writes none.
    max_shard_size: of a file, in bytes or like '300MB'; a larger model is in several files, with
      an index.
    form, encoding: of `formats`, how rounded weights are stored; None writes their dense values.

  Raises:
    InputError: params are not those of the config or are spread over several hosts, the format has
      no words for them, or the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  odd = misfits(config, params)
  if odd:
    raise InputError(f'{tensors.listed(odd)}: not as in a {family.model_type} of this config; '
                     'merge or remove what was added, or give the config of these parameters')
  far = [n for n, x in tree.named_arrays(params).items()
         if not getattr(x, 'is_fully_addressable', True)]
  if far:
    raise InputError(f'{far[0]} is spread over several hosts; save it from a single host')
  wanted, value = written(family, config, dict(leaves(params)))
  dtype, how = jnp.result_type(*{d for shape, d in wanted.values() if len(shape) > 1}), None
  if form is not None:
    wanted, value, how = in_format(form, encoding, family, config, dict(leaves(params)), wanted,
                                   value)
  try:
    shards.write(folder, wanted, value, shards.nbytes(max_shard_size))
    write_config(folder, family, config, hf_config, dtype, how)
  except OSError as error:
    raise InputError(f'cannot write in {str(folder)!r} ({error}); free space or give another '
                     'folder') from error


def write_config(folder, family, config, hf_config=None, dtype='float32', quantization=None):
  """Writes config.json: of the config, the ids of special tokens in `hf_config`, and the
  quantization_config, if there is one.
  """
  tokens = {k: (hf_config or {}).get(k) for k in _TOKENS}
  hf = tokens | family.to_hf(config)
  hf |= dict(torch_dtype=str(dtype))
  hf |= {} if quantization is None else dict(quantization_config=quantization)
  text = json.dumps(hf, indent=2)
  pathlib.Path(folder, 'config.json').write_text(text + '\n', encoding='utf-8')


def abstract(config):
  """The params of `config.module`, with jax.ShapeDtypeStruct for arrays."""
  module = config.module
  tokens = {name: jax.ShapeDtypeStruct((1, 1), jnp.int32) for name in module.inputs}
  return jax.eval_shape(lambda given: module.init(jax.random.key(0), **given), tokens)['params']


def leaves(params):
  """[(name, weight or array)], in the tree's order."""
  found = jax.tree_util.tree_leaves_with_path(params, is_leaf=tree.is_weight)
  return [(tree.name(path), leaf) for path, leaf in found]


def misfits(config, params):
  """The names that params lack, have beyond those of `config.module`, or have in other shapes."""
  found, wanted = shapes(without_beside(params)), shapes(abstract(config))
  return [n for n in wanted | found if found.get(n) != wanted.get(n)]


def shapes(params):
  """{name: shape of the dense value}."""
  return {name: tuple(leaf.shape) for name, leaf in leaves(params)}
