"""Layers with a window among layers without: layer_types and sliding_window of config.json."""
from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.families.base import positive, require
from lean_jax.models.families.rope_config import FULL, SLIDING


def layers_of(hf, slides, rotary=0):
  """The Layer of each layer, with config.json's layer_types.

  Args:
    hf: config.json.
    slides: of the number of a layer, whether it has the window where config.json does not say.
    rotary: which of the config's ropes layers with the window use.

  Raises:
    InputError: there are other types, or not one for each layer.
  """
  count, types = positive(hf, 'num_hidden_layers'), hf.get('layer_types')
  if types is None:
    types = [SLIDING if slides(k) else FULL for k in range(count)]
  good = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
  if not good or len(types) != count:
    raise InputError(f'config.json has layer_types = {types!r}, expected {FULL} or {SLIDING} for '
                     f'each of {count} layers')
  if SLIDING not in types:
    return (Layer(),) * count
  near = Layer(window=positive(hf, 'sliding_window'), rotary=rotary)
  return tuple(near if kind == SLIDING else Layer() for kind in types)


def same_layers(hf):
  """The Layer of each layer of a family that has a window in all of them, or in none.

  Raises:
    InputError: layer_types, which transformers does not read here, say otherwise.
  """
  every = hf.get('sliding_window') is not None
  types = [SLIDING if every else FULL] * positive(hf, 'num_hidden_layers')
  require(hf, dict(layer_types=(None, types)))
  return layers_of(hf, lambda k: every)


def layer_types(c):
  """layer_types of config.json."""
  return [FULL if layer.window is None else SLIDING for layer in c.each]


def window(c):
  """sliding_window of config.json."""
  return next((layer.window for layer in c.each if layer.window is not None), None)
