"""What a family is, and what its translations of a config share."""
import dataclasses
from collections.abc import Callable

from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Family:
  """How a family's Hugging Face checkpoint maps to a decoder.

  Attributes:
    model_type: as in config.json.
    from_hf: config.json to our config; raises InputError for what we do not compute.
    to_hf: our config to config.json, without token ids.
    names: {our weight: (its tensor, whether the tensor is the transpose)}; '{}' stands for the
      layer, along axis 0 of our weight.
  """
  model_type: str
  from_hf: Callable[[dict], DecoderConfig]
  to_hf: Callable[[DecoderConfig], dict]
  names: dict[str, tuple[str, bool]]


def require(hf, neutral):
  """Raises InputError if a key of config.json asks for mathematics that we do not have.

  Args:
    hf: config.json.
    neutral: {key: the values that change nothing}; an absent key is neutral.
  """
  asked = [f'{k} = {hf[k]!r}' for k, allowed in neutral.items() if k in hf and hf[k] not in allowed]
  if asked:
    raise InputError(f'config.json asks for {", ".join(asked)}, which lean_jax does not compute; '
                     'give a model without')


def positive(hf, key, kind=int):
  """A number of config.json.

  Raises:
    InputError: it is absent, of another kind or not positive.
  """
  value = hf.get(key)
  number = isinstance(value, (int, kind)) and not isinstance(value, bool)
  if not number or not 0 < value < float('inf'):
    raise InputError(f'config.json has {key} = {value!r}, expected a positive {kind.__name__}; '
                     'download it again')
  return kind(value)


def rope_theta(hf):
  """The base of plain rotary frequencies, as transformers 4 or 5 spells it.

  Raises:
    InputError: the frequencies are scaled, or differ between layers.
  """
  scaling, rope = hf.get('rope_scaling') or {}, hf.get('rope_parameters') or {}
  for key, given in (('rope_scaling', scaling), ('rope_parameters', rope)):
    if not isinstance(given, dict):
      raise InputError(f'config.json has {key} = {given!r}, expected an object; download it again')
    kind = given.get('rope_type', given.get('type', 'default'))
    plain = all(not isinstance(v, (dict, list)) for v in given.values())
    if kind != 'default' or given.get('partial_rotary_factor', 1) != 1 or not plain:
      raise InputError(f'config.json asks for {key} = {given}, which lean_jax does not compute; '
                       'give a model with rope_type default')
  thetas = [d['rope_theta'] for d in (rope, scaling, hf) if d.get('rope_theta') is not None]
  return positive(dict(rope_theta=[*thetas, 10_000.][0]), 'rope_theta', float)
