"""One file a family: its config and its checkpoint's names; and a line here."""
from lean_jax.errors import InputError
from lean_jax.models.families.bart import BART
from lean_jax.models.families.base import Family
from lean_jax.models.families.bert import BERT
from lean_jax.models.families.deepseek_v3 import DEEPSEEK_V3
from lean_jax.models.families.distilbert import DISTILBERT
from lean_jax.models.families.gemma import GEMMA
from lean_jax.models.families.gemma2 import GEMMA2
from lean_jax.models.families.gemma3_text import GEMMA3_TEXT
from lean_jax.models.families.gpt2 import GPT2
from lean_jax.models.families.gpt_neox import GPT_NEOX
from lean_jax.models.families.gpt_oss import GPT_OSS
from lean_jax.models.families.jamba import JAMBA
from lean_jax.models.families.lean_lstm import LEAN_LSTM
from lean_jax.models.families.llama import LLAMA
from lean_jax.models.families.mamba import MAMBA
from lean_jax.models.families.mamba2 import MAMBA2
from lean_jax.models.families.mistral import MISTRAL
from lean_jax.models.families.mixtral import MIXTRAL
from lean_jax.models.families.modernbert import MODERNBERT
from lean_jax.models.families.olmo2 import OLMO2
from lean_jax.models.families.opt import OPT
from lean_jax.models.families.phi import PHI
from lean_jax.models.families.phi3 import PHI3
from lean_jax.models.families.qwen2 import QWEN2
from lean_jax.models.families.qwen3 import QWEN3
from lean_jax.models.families.qwen3_moe import QWEN3_MOE
from lean_jax.models.families.roberta import ROBERTA
from lean_jax.models.families.t5 import T5

FAMILIES = {family.model_type: family for family in (
    BART, BERT, DEEPSEEK_V3, DISTILBERT, GEMMA, GEMMA2, GEMMA3_TEXT, GPT2, GPT_NEOX, GPT_OSS, JAMBA,
    LEAN_LSTM, LLAMA, MAMBA, MAMBA2, MISTRAL, MIXTRAL, MODERNBERT, OLMO2, OPT, PHI, PHI3, QWEN2,
    QWEN3, QWEN3_MOE, ROBERTA, T5)}

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
