"""Llama (Touvron et al. 2023, arXiv:2302.13971), with grouped queries and an optional tied head."""
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families.base import (
  Family,
  Stored,
  head_shape,
  linear,
  positive,
  require,
  rope_theta,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.rope import Rope

# The values with which these keys of config.json change nothing.
NEUTRAL = dict(
    attention_bias=(False, None), mlp_bias=(False, None), hidden_act=('silu', 'swish'),
    sliding_window=(None,), quantization_config=(None,), partial_rotary_factor=(1, None),
    compression_config=(None,))


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = dict(rms_norm_eps=1e-6, tie_word_embeddings=False) | hf
  return DecoderConfig(
      **head_shape(hf), vocabulary=positive(hf, 'vocab_size'),
      layers=positive(hf, 'num_hidden_layers'), hidden=positive(hf, 'intermediate_size'),
      context=positive(hf, 'max_position_embeddings'),
      attention=AttentionOptions(ropes=(Rope(theta=rope_theta(hf)),)),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config, in the spelling that transformers 4 and 5 both read."""
  return dict(
      architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=c.vocabulary,
      hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
      num_key_value_heads=c.groups, head_dim=c.head_width, intermediate_size=c.hidden,
      max_position_embeddings=c.context, rope_theta=c.attention.ropes[0].theta,
      rms_norm_eps=c.epsilon, tie_word_embeddings=c.tied, hidden_act='silu', attention_bias=False,
      mlp_bias=False)


def names(c):
  """Where a checkpoint has each array; biases and other norms are there for families like this."""
  layer, out = 'model.layers.{layer}.', {'embed/table': Stored('model.embed_tokens.weight')}
  for ours, theirs in (('attention/q', 'self_attn.q_proj'), ('attention/k', 'self_attn.k_proj'),
                       ('attention/v', 'self_attn.v_proj'), ('attention/o', 'self_attn.o_proj'),
                       ('mlp/gate', 'mlp.gate_proj'), ('mlp/up', 'mlp.up_proj'),
                       ('mlp/down', 'mlp.down_proj')):
    out[f'layers/{ours}/kernel'] = linear(f'{layer}{theirs}.weight')
    out[f'layers/{ours}/bias'] = Stored(f'{layer}{theirs}.bias')
  for ours, theirs in (('mixer_norm', 'input_layernorm'),
                       ('feed_forward_norm', 'post_attention_layernorm'),
                       ('attention/q_norm', 'self_attn.q_norm'),
                       ('attention/k_norm', 'self_attn.k_norm')):
    out[f'layers/{ours}/scale'] = Stored(f'{layer}{theirs}.weight')
  return out | {'norm/scale': Stored('model.norm.weight'), 'head/kernel': linear('lm_head.weight')}


LLAMA = Family('llama', from_hf, to_hf, names, prefix='model.')
