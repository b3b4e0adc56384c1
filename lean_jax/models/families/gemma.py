"""Gemma (arXiv:2403.08295): wide heads, scaled embeddings, norms' scales stored less one."""
import dataclasses

from lean_jax.models.families import llama
from lean_jax.models.families.base import Family, activation_name, require

DEFAULTS = dict(
    vocab_size=256000, hidden_size=3072, intermediate_size=24576, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=16, head_dim=256, hidden_act='gelu_pytorch_tanh',
    max_position_embeddings=8192, rms_norm_eps=1e-6, tie_word_embeddings=True)
TANH = 'gelu_pytorch_tanh'


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  hf = DEFAULTS | hf
  # 'gelu' was written for what is computed with tanh.
  hf = hf | dict(hidden_act=TANH if hf['hidden_act'] == 'gelu' else hf['hidden_act'])
  require(hf, dict(hidden_activation=(hf['hidden_act'], None)))
  return shared(hf)


def shared(hf, **rotary):
  """Llama's config with Gemma's norms and embeddings."""
  require(hf, dict(use_bidirectional_attention=(False, None), mlp_bias=(False, None)))
  c = llama.shared(hf, **rotary)
  return dataclasses.replace(c, norm_offset=1., embedding_scale=c.width ** .5)


def to_hf(c):
  """config.json of a config."""
  return llama.shared_hf(c, 'gemma', 'GemmaForCausalLM') | dict(
      attention_bias=c.attention.bias, hidden_act=activation(c))


def activation(c):
  """hidden_act of config.json."""
  return TANH if c.mlp.activation == 'gelu_tanh' else activation_name(c.mlp.activation)


GEMMA = Family('gemma', from_hf, to_hf, llama.names, prefix='model.')
