"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a window in every layer."""
import dataclasses

from lean_jax.models.families import llama
from lean_jax.models.families.base import Family, require
from lean_jax.models.families.layer_types import same_layers, window

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, hidden_act='silu',
    max_position_embeddings=131072, rms_norm_eps=1e-6, tie_word_embeddings=False,
    sliding_window=4096)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(attention_bias=(False, None), mlp_bias=(False, None)))
  hf = DEFAULTS | hf
  return dataclasses.replace(llama.shared(hf), kinds=same_layers(hf))


def to_hf(c):
  """config.json of a config."""
  return llama.shared_hf(c, 'mistral', 'MistralForCausalLM') | dict(sliding_window=window(c))


MISTRAL = Family('mistral', from_hf, to_hf, llama.names, prefix='model.')
