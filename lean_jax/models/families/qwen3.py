"""Qwen3 (Qwen Team 2025, arXiv:2505.09388): norms of each head's queries and keys."""
import dataclasses

from lean_jax.models.families import llama, qwen2
from lean_jax.models.families.base import Family, require

DEFAULTS = qwen2.DEFAULTS | dict(head_dim=128)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(mlp_bias=(False, None)))
  c = qwen2.shared(DEFAULTS | hf)
  return dataclasses.replace(c, attention=dataclasses.replace(c.attention, norm='head'))


def to_hf(c):
  """config.json of a config."""
  return qwen2.shared_hf(c, 'qwen3', 'Qwen3ForCausalLM') | dict(attention_bias=c.attention.bias)


QWEN3 = Family('qwen3', from_hf, to_hf, llama.names, prefix='model.')
