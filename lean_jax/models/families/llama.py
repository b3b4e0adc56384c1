"""Llama (Touvron et al. 2023, arXiv:2302.13971), with grouped queries and an optional tied head."""
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families.base import Family, positive, require, rope_theta

# The values with which these keys of config.json change nothing.
NEUTRAL = dict(
    attention_bias=(False, None), mlp_bias=(False, None), hidden_act=('silu', 'swish'),
    sliding_window=(None,), quantization_config=(None,), partial_rotary_factor=(1, None),
    compression_config=(None,))

NAMES = {
    'embed/table': ('model.embed_tokens.weight', False),
    'layers/attention_norm/scale': ('model.layers.{}.input_layernorm.weight', False),
    'layers/attention/q/kernel': ('model.layers.{}.self_attn.q_proj.weight', True),
    'layers/attention/k/kernel': ('model.layers.{}.self_attn.k_proj.weight', True),
    'layers/attention/v/kernel': ('model.layers.{}.self_attn.v_proj.weight', True),
    'layers/attention/o/kernel': ('model.layers.{}.self_attn.o_proj.weight', True),
    'layers/mlp_norm/scale': ('model.layers.{}.post_attention_layernorm.weight', False),
    'layers/mlp/gate/kernel': ('model.layers.{}.mlp.gate_proj.weight', True),
    'layers/mlp/up/kernel': ('model.layers.{}.mlp.up_proj.weight', True),
    'layers/mlp/down/kernel': ('model.layers.{}.mlp.down_proj.weight', True),
    'norm/scale': ('model.norm.weight', False),
    'head/kernel': ('lm_head.weight', True),
}


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = dict(rms_norm_eps=1e-6, tie_word_embeddings=False) | hf
  width, heads = positive(hf, 'hidden_size'), positive(hf, 'num_attention_heads')
  given = lambda key, default: default if hf.get(key) is None else positive(hf, key)
  groups, head_width = given('num_key_value_heads', heads), given('head_dim', width // heads)
  if heads % groups or head_width < 2 or head_width % 2:
    raise InputError(f'config.json has {heads} heads, {groups} key and value heads and a head '
                     f'width of {head_width}; the second must divide the first, the last be even')
  return DecoderConfig(
      vocabulary=positive(hf, 'vocab_size'), width=width, layers=positive(hf, 'num_hidden_layers'),
      heads=heads, groups=groups, head_width=head_width, hidden=positive(hf, 'intermediate_size'),
      context=positive(hf, 'max_position_embeddings'), rope_theta=rope_theta(hf),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config, in the spelling that transformers 4 and 5 both read."""
  return dict(
      architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=c.vocabulary,
      hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
      num_key_value_heads=c.groups, head_dim=c.head_width, intermediate_size=c.hidden,
      max_position_embeddings=c.context, rope_theta=c.rope_theta, rms_norm_eps=c.epsilon,
      tie_word_embeddings=c.tied, hidden_act='silu', attention_bias=False, mlp_bias=False)


LLAMA = Family('llama', from_hf, to_hf, NAMES)
