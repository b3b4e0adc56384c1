"""How a student starts: as some of the teacher's layers."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.segments import restacked, unstacked
from lean_jax.weights.beside import refuse_beside


def alternating(layers, keep):
  """Indices of `keep` of `layers` layers, evenly spread, the first among them.

  With keep = layers / 2 these are every other layer (Sanh et al. 2019, arXiv:1910.01108,
  section 2).

  Raises:
    InputError: keep is not within 1 and layers.
  """
  if not 1 <= keep <= layers:
    raise InputError(f'a student of {keep} layers cannot start from a teacher of {layers}; '
                     f'expected 1 to {layers}')
  return tuple(k * layers // keep for k in range(keep))


def evenly(model, keep):
  """A `lean_jax.Model` with `keep` of its layers, those of `alternating`."""
  config, params = take_layers(model.config, model.params,
                               alternating(model.config.layers, keep))
  return dataclasses.replace(model, config=config, params=params)


def take_layers(config, params, indices):
  """The model made of some layers of a stack, in the order given.

  Args:
    config: of a decoder or an encoder.
    params: its parameters, the layers under 'layers'.
    indices: of the layers to keep.

  Returns:
    config, params, of the smaller model; arrays are copies.
  """
  refuse_beside(params, 'cut to fewer layers')
  each = unstacked(config, params['layers'])
  kinds = tuple(config.kinds[k] for k in indices) if config.kinds else ()
  smaller = dataclasses.replace(config, layers=len(indices), kinds=kinds)
  return smaller, {**params, 'layers': restacked(smaller, [each[k] for k in indices])}
