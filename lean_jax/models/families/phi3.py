"""Phi-3, 3.5 and 4 (arXiv:2404.14219): Llama with products stored side by side, and LongRoPE."""
import dataclasses

from lean_jax.models.families import llama
from lean_jax.models.families.base import Family, parts, require
from lean_jax.models.families.layer_types import same_layers, window
from lean_jax.models.families.rope_config import ORIGINAL

DEFAULTS = {
    'vocab_size': 32064, 'hidden_size': 3072, 'intermediate_size': 8192, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'hidden_act': 'silu', 'max_position_embeddings': 4096,
    ORIGINAL: 4096, 'rms_norm_eps': 1e-5, 'tie_word_embeddings': False, 'sliding_window': None}
RENAMED = ('su', 'yarn')      # what the first releases called longrope


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(attention_bias=(False, None), mlp_bias=(False, None),
                   lm_head_bias=(False, None)))
  hf = DEFAULTS | hf
  for key in ('rope_scaling', 'rope_parameters'):
    if isinstance(hf.get(key), dict):
      types = {k: 'longrope' for k in ('type', 'rope_type') if hf[key].get(k) in RENAMED}
      hf = hf | {key: hf[key] | types}
  return dataclasses.replace(llama.shared(hf, partial=True), kinds=same_layers(hf))


def to_hf(c):
  """config.json of a config."""
  return llama.shared_hf(c, 'phi3', 'Phi3ForCausalLM') | dict(sliding_window=window(c))


def names(c):
  """Where a checkpoint has each array."""
  layer, K = 'model.layers.{layer}.', c.head_width
  q, k, v = parts(f'{layer}self_attn.qkv_proj.weight', (c.heads * K, c.groups * K, c.groups * K))
  gate, up = parts(f'{layer}mlp.gate_up_proj.weight', (c.hidden, c.hidden))
  return llama.names(c) | {f'layers/{ours}/kernel': stored for ours, stored in (
      ('attention/q', q), ('attention/k', k), ('attention/v', v), ('mlp/gate', gate),
      ('mlp/up', up))}


PHI3 = Family('phi3', from_hf, to_hf, names, prefix='model.')
