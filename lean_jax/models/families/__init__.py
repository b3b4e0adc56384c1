"""One file a family: its config and its checkpoint's names; and a line here."""
from lean_jax.errors import InputError
from lean_jax.models.families.bart import BART
from lean_jax.models.families.base import Family
from lean_jax.models.families.gpt2 import GPT2
from lean_jax.models.families.llama import LLAMA
from lean_jax.models.families.mixtral import MIXTRAL
from lean_jax.models.families.opt import OPT
from lean_jax.models.families.qwen3_moe import QWEN3_MOE
from lean_jax.models.families.t5 import T5

FAMILIES = {family.model_type: family for family in (
    BART, GPT2, LLAMA, MIXTRAL, OPT, QWEN3_MOE, T5)}

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
