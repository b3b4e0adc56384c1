"""OPT (Zhang et al. 2022, arXiv:2205.01068), its 350m among them, which normalises afterwards."""
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  equal_heads,
  given,
  layer_norm,
  linear,
  positive,
  require,
  with_bias,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=50272, hidden_size=768, num_hidden_layers=12, ffn_dim=3072,
    max_position_embeddings=2048, do_layer_norm_before=True, _remove_final_layer_norm=False,
    word_embed_proj_dim=None, num_attention_heads=12, activation_function='relu', enable_bias=True,
    layer_norm_elementwise_affine=True, tie_word_embeddings=True)
OFFSET = 2                    # rows of the table of positions before that of the first token


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, {})
  hf = DEFAULTS | hf
  width, context = positive(hf, 'hidden_size'), positive(hf, 'max_position_embeddings')
  embedding, before = given(hf, 'word_embed_proj_dim', width), bool(hf['do_layer_norm_before'])
  bias, affine = bool(hf['enable_bias']), bool(hf['layer_norm_elementwise_affine'])
  return DecoderConfig(
      **equal_heads(width, positive(hf, 'num_attention_heads')),
      vocabulary=positive(hf, 'vocab_size'), layers=positive(hf, 'num_hidden_layers'),
      hidden=positive(hf, 'ffn_dim'), context=context, positions=context + OFFSET,
      position_offset=OFFSET, embedding_width=None if embedding == width else embedding,
      norm='layer', norm_bias=affine, norm_scale=affine, norm_before=before, norm_sum=not before,
      final_norm=before and not hf['_remove_final_layer_norm'],
      attention=AttentionOptions(ropes=(), bias=bias, out_bias=bias),
      mlp=MLPOptions(gated=False, activation=chosen(hf, 'activation_function', ACTIVATIONS),
                     bias=bias),
      tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config."""
  return dict(
      architectures=['OPTForCausalLM'], model_type='opt', vocab_size=c.vocabulary,
      hidden_size=c.width, num_hidden_layers=c.layers, ffn_dim=c.hidden,
      max_position_embeddings=c.context, do_layer_norm_before=c.norm_before,
      _remove_final_layer_norm=c.norm_before and not c.final_norm,
      word_embed_proj_dim=c.embedding_width or c.width, num_attention_heads=c.heads,
      activation_function=activation_name(c.mlp.activation), enable_bias=c.attention.bias,
      layer_norm_elementwise_affine=c.norm_scale, tie_word_embeddings=c.tied)


def names(c):
  """Where a checkpoint has each array; norms have one place, before a branch or after the sum."""
  layer = 'model.decoder.layers.{layer}.'
  out = {'embed/table': Stored('model.decoder.embed_tokens.weight'),
         'positions/table': Stored('model.decoder.embed_positions.weight'),
         'embed_in/kernel': linear('model.decoder.project_in.weight'),
         'embed_out/kernel': linear('model.decoder.project_out.weight'),
         'head/kernel': linear('lm_head.weight')}
  for part, name in dict(q='q_proj', k='k_proj', v='v_proj', o='out_proj').items():
    out |= with_bias(f'layers/attention/{part}', f'{layer}self_attn.{name}')
  out |= with_bias('layers/mlp/up', f'{layer}fc1') | with_bias('layers/mlp/down', f'{layer}fc2')
  suffix = '' if c.norm_before else '_sum'
  return (out | layer_norm(f'layers/mixer_norm{suffix}', f'{layer}self_attn_layer_norm')
          | layer_norm(f'layers/feed_forward_norm{suffix}', f'{layer}final_layer_norm')
          | layer_norm('norm', 'model.decoder.final_layer_norm'))


OPT = Family('opt', from_hf, to_hf, names, prefix='model.')
