"""One file a family: its config and its checkpoint's names; and a line here."""
from lean_jax.errors import InputError
from lean_jax.models.families.base import Family
from lean_jax.models.families.gpt2 import GPT2
from lean_jax.models.families.llama import LLAMA
from lean_jax.models.families.opt import OPT

FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, OPT)}

__all__ = ['FAMILIES', 'Family', 'family_of']


def family_of(hf):
  """The family of a config.json.

  Raises:
    InputError: there is none for its model_type.
  """
  kind = hf.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise InputError(f'config.json has model_type {kind!r}; lean_jax reads: {", ".join(FAMILIES)}')
  return FAMILIES[kind]
