"""OLMo 2 (arXiv:2501.00656): norms after each branch only, and of whole queries and keys."""
import dataclasses

from lean_jax.models.families import llama
from lean_jax.models.families.base import Family, Stored, require

DEFAULTS = dict(
    vocab_size=50304, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, hidden_act='silu', max_position_embeddings=2048, rms_norm_eps=1e-5,
    tie_word_embeddings=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(sliding_window=(None,), mlp_bias=(False, None), clip_qkv=(None,)))
  c = llama.shared(DEFAULTS | hf)
  return dataclasses.replace(c, attention=dataclasses.replace(c.attention, norm='whole'),
                             norm_before=False, norm_after=True)


def to_hf(c):
  """config.json of a config."""
  return llama.shared_hf(c, 'olmo2', 'Olmo2ForCausalLM') | dict(attention_bias=c.attention.bias)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.'
  return llama.names(c) | {f'layers/{ours}_norm_after/scale': Stored(f'{layer}{theirs}.weight')
                           for ours, theirs in (('mixer', 'post_attention_layernorm'),
                                                ('feed_forward', 'post_feedforward_layernorm'))}


OLMO2 = Family('olmo2', from_hf, to_hf, names, prefix='model.')
