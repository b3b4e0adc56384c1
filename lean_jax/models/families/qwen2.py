"""Qwen2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): biases of queries, keys and values."""
import dataclasses

from lean_jax.models.families import llama
from lean_jax.models.families.base import Family, require
from lean_jax.models.families.layer_types import layer_types, layers_of, window

DEFAULTS = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, hidden_act='silu',
    max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
    use_sliding_window=False, sliding_window=4096, max_window_layers=28)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(attention_bias=(True, None), mlp_bias=(False, None), use_mrope=(False, None)))
  c = shared(DEFAULTS | hf)
  return dataclasses.replace(c, attention=dataclasses.replace(c.attention, bias=True))


def shared(hf):
  """Llama's config with Qwen's windows: of the layers above the first max_window_layers."""
  if not hf['use_sliding_window']:
    hf = hf | dict(sliding_window=None)
  near = hf['sliding_window'] is not None
  kinds = layers_of(hf, lambda k: near and k >= hf['max_window_layers'])
  return dataclasses.replace(llama.shared(hf), kinds=kinds)


def to_hf(c):
  """config.json of a config."""
  return shared_hf(c, 'qwen2', 'Qwen2ForCausalLM')


def shared_hf(c, model_type, architecture):
  """The inverse of `shared`; the number of first layers is for transformers older than types."""
  types = layer_types(c)
  return llama.shared_hf(c, model_type, architecture) | dict(
      use_sliding_window=window(c) is not None, sliding_window=window(c), layer_types=types,
      max_window_layers=next((k for k, l in enumerate(c.each) if l.window is not None), c.layers))


QWEN2 = Family('qwen2', from_hf, to_hf, llama.names, prefix='model.')
