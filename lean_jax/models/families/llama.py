"""Llama (Touvron et al. 2023, arXiv:2302.13971), and what families like it share."""
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  head_shape,
  linear,
  positive,
  require,
)
from lean_jax.models.families.rope_config import context, rope_hf, ropes
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, hidden_act='silu', max_position_embeddings=2048, rms_norm_eps=1e-6,
    tie_word_embeddings=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(sliding_window=(None,), rope_interleaved=(False, None)))
  return shared(DEFAULTS | hf)


def shared(hf, **rotary):
  """The config of the keys that families like this have in common; `rotary` is for `ropes`."""
  heads, bias = head_shape(hf), bool(hf.get('attention_bias'))
  rotary = ropes(hf, heads['head_width'], **rotary)
  return DecoderConfig(
      **heads, vocabulary=positive(hf, 'vocab_size'), layers=positive(hf, 'num_hidden_layers'),
      hidden=positive(hf, 'intermediate_size'), context=context(hf, rotary),
      attention=AttentionOptions(ropes=rotary, bias=bias, out_bias=bias),
      mlp=MLPOptions(activation=chosen(hf, 'hidden_act', ACTIVATIONS),
                     bias=bool(hf.get('mlp_bias'))),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config."""
  return shared_hf(c, 'llama', 'LlamaForCausalLM') | dict(
      attention_bias=c.attention.bias, mlp_bias=c.mlp.bias)


def shared_hf(c, model_type, architecture):
  """The inverse of `shared`, but for biases."""
  return dict(
      architectures=[architecture], model_type=model_type, vocab_size=c.vocabulary,
      hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
      num_key_value_heads=c.groups, head_dim=c.head_width, intermediate_size=c.hidden,
      rms_norm_eps=c.epsilon, tie_word_embeddings=c.tied,
      hidden_act=activation_name(c.mlp.activation), **rope_hf(c.attention.ropes, c.context))


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
