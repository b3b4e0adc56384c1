"""Phi 1, 1.5 and 2 (Li et al. 2023, arXiv:2309.05463): both branches share a norm."""
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  head_shape,
  layer_norm,
  positive,
  require,
  with_bias,
)
from lean_jax.models.families.rope_config import context, rope_hf, ropes
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
    num_attention_heads=32, hidden_act='gelu_new', max_position_embeddings=2048,
    layer_norm_eps=1e-5, partial_rotary_factor=.5, qk_layernorm=False)
NEUTRAL = dict(tie_word_embeddings=(False,))             # a tied head with a bias of its own


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = DEFAULTS | hf
  heads = head_shape(hf)
  rotary = ropes(hf, heads['head_width'], partial=True)
  return DecoderConfig(
      **heads, vocabulary=positive(hf, 'vocab_size'),
      layers=positive(hf, 'num_hidden_layers'), hidden=positive(hf, 'intermediate_size'),
      context=context(hf, rotary), norm='layer',
      epsilon=positive(hf, 'layer_norm_eps', float), parallel=True, shared_norm=True,
      attention=AttentionOptions(ropes=rotary, bias=True, out_bias=True,
                                 norm='head' if hf['qk_layernorm'] else None),
      mlp=MLPOptions(gated=False, activation=chosen(hf, 'hidden_act', ACTIVATIONS), bias=True),
      tied=False, head_bias=True)


def to_hf(c):
  """config.json of a config."""
  return dict(
      architectures=['PhiForCausalLM'], model_type='phi', vocab_size=c.vocabulary,
      hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
      num_attention_heads=c.heads, num_key_value_heads=c.groups, head_dim=c.head_width,
      hidden_act=activation_name(c.mlp.activation), layer_norm_eps=c.epsilon,
      qk_layernorm=c.attention.norm == 'head', tie_word_embeddings=False,
      **dict(partial_rotary_factor=1.) | rope_hf(c.attention.ropes, c.context))


def names(c):
  """Where a checkpoint has each array."""
  layer, out = 'model.layers.{layer}.', {'embed/table': Stored('model.embed_tokens.weight')}
  for ours, theirs in (('attention/q', 'self_attn.q_proj'), ('attention/k', 'self_attn.k_proj'),
                       ('attention/v', 'self_attn.v_proj'), ('attention/o', 'self_attn.dense'),
                       ('mlp/up', 'mlp.fc1'), ('mlp/down', 'mlp.fc2')):
    out |= with_bias(f'layers/{ours}', f'{layer}{theirs}')
  for ours, theirs in (('mixer_norm', 'input_layernorm'),
                       ('attention/q_norm', 'self_attn.q_layernorm'),
                       ('attention/k_norm', 'self_attn.k_layernorm')):
    out |= layer_norm(f'layers/{ours}', f'{layer}{theirs}')
  return out | layer_norm('norm', 'model.final_layernorm') | with_bias('head', 'lm_head')


PHI = Family('phi', from_hf, to_hf, names, prefix='model.')
