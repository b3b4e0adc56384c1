"""Which tensors of a checkpoint our arrays are, by name: what is there, and what is to be."""
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.interop.tensors import FLOATS, listed
from lean_jax.models.segments import located, taken


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


def unprefixed(found, family):
  """Tensors by the names of today, with the family's prefix where a checkpoint leaves it out."""
  for old, new in family.older.items():
    found = {re.sub(f'{re.escape(old)}$', new, name): tensor for name, tensor in found.items()}
  if not family.prefix or any(name.startswith(family.prefix) for name in found):
    return found
  return found | {family.prefix + name: tensor for name, tensor in found.items()}


def check(folder, family, config, shapes, found):
  """Raises InputError if the tensors in a folder are not those of its config.

  Args:
    shapes: {our array: its shape}.
    found: {name: Tensor}.
  """
  names, wanted = family.names(config), {}
  for path, shape in shapes.items():
    key, layers = place(config, path)
    for name, at in pieces(names[key], layers, shape):
      wanted[name] = names[key].tensor_shape(shape[len(at):])
  repeated = family.copies | copies(family, config)
  there = {n: found[n] for n in wanted if n in found}
  used = {found[n].name for n in (*wanted, *repeated) if n in found}
  extra = {t.name for t in found.values()} - used
  faults = {
      'missing': [n for n in wanted
                  if n not in found and not re.fullmatch(family.optional, n)],
      'unknown': [n for n in sorted(extra) if not re.fullmatch(family.ignored, n)],
      'misshapen': [f'{n} {t.shape} instead of {wanted[n]}' for n, t in there.items()
                    if t.shape != wanted[n]],
      'not float': [f'{n} {t.kind}' for n, t in there.items() if t.kind not in FLOATS]}
  faults = [f'{what} {listed(names)}' for what, names in faults.items() if names]
  if faults:
    raise InputError(f'{str(folder)!r} does not fit its config.json: {"; ".join(faults)}; '
                     'give the files of one model')
  for copy, original in repeated.items():
    if differs(found, copy, original):
      reason = ('which lean_jax computes as one; give a model that shares them'
                if copy in family.copies else
                'though its config.json ties them; set tie_word_embeddings to false')
      raise InputError(f'{str(folder)!r} has a {copy} that differs from {original}, {reason}')


def copies(family, config):
  """{the output head of a checkpoint: the embeddings that it repeats}, of a tied model."""
  names = family.names(config)
  heads = [stored.name for key, stored in names.items() if key.endswith('head/kernel')]
  tied = getattr(config, 'tied', False)
  return dict.fromkeys(heads, names['embed/table'].name) if tied else {}


def differs(found, one, other):
  """Whether a checkpoint has two tensors and they are not equal."""
  if one not in found or other not in found:
    return False
  one, other = found[one], found[other]
  if one.shape != other.shape or not {one.kind, other.kind} <= FLOATS.keys():
    return True
  return not all(np.array_equal(a, b, equal_nan=True)
                 for (_, a), (_, b) in zip(one.blocks(), other.blocks()))


class Part(NamedTuple):
  """A part of a tensor to be written.

  Attributes:
    stored: how it is stored.
    path: of the array of ours that has it.
    layer: its number in that array; None where that is not of several.
    at: where it is in the array of the layer.
    order: where its tensor belongs among others.
  """
  stored: Any
  path: str
  layer: int | None
  at: tuple
  order: int


def gathered(family, config, params):
  """{tensor: {its index among the parts of the tensor: Part}}. Args as of `written`."""
  names, parts = family.names(config), {}
  for path, leaf in params.items():
    key, layers = place(config, path)
    stored, stacked = names[key], isinstance(layers, tuple)
    for name, at in pieces(stored, layers, leaf.shape):
      number = layers[at[0]] if stacked else -1 if layers is None else layers
      parts.setdefault(name, {})[stored.index] = (
          Part(stored, path, at[0], at[1:], number) if stacked else
          Part(stored, path, None, at, number))
  return parts


def written(family, config, params):
  """What a checkpoint has of params.

  Args:
    params: {name: weight or array}.

  Returns:
    {tensor: (shape, dtype)}, layer after layer; and the function from the name of a tensor to its
    value, which keeps no more than a few arrays of one layer.
  """
  parts = gathered(family, config, params)
  dense = {path: jax.eval_shape(meta.unbox, leaf) for path, leaf in params.items()}

  def about(cut):
    stored, path, layer, at, _ = cut[0]
    shape = dense[path].shape[len(at) + (layer is not None):]
    return stored.tensor_shape(shape), jnp.result_type(*(dense[p.path].dtype for p in cut.values()))

  @functools.lru_cache(maxsize=3)                      # experts are written one by one
  def array(path, layer):
    return np.asarray(meta.unbox(params[path] if layer is None else taken(params[path], layer)))

  def value(name):
    cut = [parts[name][k] for k in range(len(parts[name]))]
    return cut[0].stored.join([p.stored.write(array(p.path, p.layer)[p.at]) for p in cut])
  ordered = sorted(parts, key=lambda name: parts[name][0].order)
  return {name: about(parts[name]) for name in ordered}, value
