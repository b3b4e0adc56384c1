"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), and Pythia (arXiv:2304.01373)."""
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  equal_heads,
  layer_norm,
  linear,
  parts,
  positive,
  require,
  with_bias,
)
from lean_jax.models.families.rope_config import context, rope_hf, ropes
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=50432, hidden_size=6144, num_hidden_layers=44, num_attention_heads=64,
    intermediate_size=24576, hidden_act='gelu', max_position_embeddings=2048, layer_norm_eps=1e-5,
    tie_word_embeddings=False, use_parallel_residual=True, attention_bias=True,
    rotary_emb_base=10_000., rotary_pct=.25)
# What this family calls what others call so.
ROTARY = dict(rope_theta='rotary_emb_base', partial_rotary_factor='rotary_pct')


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  hf = DEFAULTS | hf
  heads = equal_heads(positive(hf, 'hidden_size'), positive(hf, 'num_attention_heads'))
  # Only the frequencies of transformers' GPT-NeoX would follow a head_dim of its own.
  require(hf, dict(head_dim=(None, heads['head_width'])))
  rotary = ropes(hf | {key: hf[own] for key, own in ROTARY.items()}, heads['head_width'],
                 partial=True)
  bias = bool(hf['attention_bias'])
  return DecoderConfig(
      **heads, vocabulary=positive(hf, 'vocab_size'), layers=positive(hf, 'num_hidden_layers'),
      hidden=positive(hf, 'intermediate_size'), context=context(hf, rotary),
      norm='layer', epsilon=positive(hf, 'layer_norm_eps', float),
      parallel=bool(hf['use_parallel_residual']),
      attention=AttentionOptions(ropes=rotary, bias=bias, out_bias=bias),
      mlp=MLPOptions(gated=False, activation=chosen(hf, 'hidden_act', ACTIVATIONS), bias=True),
      tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config."""
  rope = dict(partial_rotary_factor=1.) | rope_hf(c.attention.ropes, c.context)
  return dict(
      architectures=['GPTNeoXForCausalLM'], model_type='gpt_neox', vocab_size=c.vocabulary,
      hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
      intermediate_size=c.hidden, hidden_act=activation_name(c.mlp.activation),
      layer_norm_eps=c.epsilon, tie_word_embeddings=c.tied, use_parallel_residual=c.parallel,
      attention_bias=c.attention.bias, **{ROTARY.get(k, k): v for k, v in rope.items()})


def names(c):
  """Where a checkpoint has each array; each head's queries, keys and values stand together."""
  layer = 'gpt_neox.layers.{layer}.'
  out = {'embed/table': Stored('gpt_neox.embed_in.weight'),
         'head/kernel': linear('embed_out.weight')}
  for kind, suffix, of in (('kernel', 'weight', linear), ('bias', 'bias', Stored)):
    qkv = parts(f'{layer}attention.query_key_value.{suffix}', [c.head_width] * 3, of=of,
                repeats=c.heads)
    out |= {f'layers/attention/{part}/{kind}': stored for part, stored in zip('qkv', qkv)}
  return (out | with_bias('layers/attention/o', f'{layer}attention.dense')
          | with_bias('layers/mlp/up', f'{layer}mlp.dense_h_to_4h')
          | with_bias('layers/mlp/down', f'{layer}mlp.dense_4h_to_h')
          | layer_norm('layers/mixer_norm', f'{layer}input_layernorm')
          | layer_norm('layers/feed_forward_norm', f'{layer}post_attention_layernorm')
          | layer_norm('norm', 'gpt_neox.final_layer_norm'))


# Old checkpoints have the causal mask and the frequencies of each layer.
GPT_NEOX = Family('gpt_neox', from_hf, to_hf, names, prefix='gpt_neox.',
                  ignored=r'(gpt_neox\.)?layers\.\d+\.attention\.'
                          r'(bias|masked_bias|rotary_emb\.inv_freq)')
