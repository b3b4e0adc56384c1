"""GPT-2 (Radford et al. 2019, Language Models are Unsupervised Multitask Learners)."""
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
  parts,
  positive,
  require,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

# reorder_and_upcast_attn is not here: scores are in float32 anyway.
DEFAULTS = dict(
    vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, n_inner=None,
    activation_function='gelu_new', layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
ALIASES = dict(hidden_size='n_embd', max_position_embeddings='n_positions',
               num_attention_heads='n_head', num_hidden_layers='n_layer')
NEUTRAL = dict(add_cross_attention=(False, None))


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = DEFAULTS | hf | {ours: hf[k] for k, ours in ALIASES.items() if k in hf}
  width, context = positive(hf, 'n_embd'), positive(hf, 'n_positions')
  return DecoderConfig(
      **equal_heads(width, positive(hf, 'n_head')), vocabulary=positive(hf, 'vocab_size'),
      layers=positive(hf, 'n_layer'), hidden=given(hf, 'n_inner', 4 * width), context=context,
      positions=context, norm='layer', epsilon=positive(hf, 'layer_norm_epsilon', float),
      attention=AttentionOptions(
          ropes=(), bias=True, out_bias=True, scale=None if hf['scale_attn_weights'] else 1.,
          scale_by_depth=bool(hf['scale_attn_by_inverse_layer_idx'])),
      mlp=MLPOptions(gated=False, activation=chosen(hf, 'activation_function', ACTIVATIONS),
                     bias=True),
      tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config."""
  return dict(
      architectures=['GPT2LMHeadModel'], model_type='gpt2', vocab_size=c.vocabulary,
      n_positions=c.context, n_embd=c.width, n_layer=c.layers, n_head=c.heads, n_inner=c.hidden,
      activation_function=activation_name(c.mlp.activation), layer_norm_epsilon=c.epsilon,
      scale_attn_weights=c.attention.scale is None,
      scale_attn_by_inverse_layer_idx=c.attention.scale_by_depth, tie_word_embeddings=c.tied)


def names(c):
  """Where a checkpoint has each array; matrices are stored as [inputs outputs]."""
  layer = 'transformer.h.{layer}.'
  out = {'embed/table': Stored('transformer.wte.weight'),
         'positions/table': Stored('transformer.wpe.weight'),
         'head/kernel': linear('lm_head.weight')}
  for k, sizes in (('weight', dict(axis=1)), ('bias', dict(axis=0))):
    kind = dict(weight='kernel', bias='bias')[k]
    qkv = parts(f'{layer}attn.c_attn.{k}', [c.width] * 3, of=Stored, **sizes)
    out |= {f'layers/attention/{part}/{kind}': stored for part, stored in zip('qkv', qkv)}
    out |= {f'layers/attention/o/{kind}': Stored(f'{layer}attn.c_proj.{k}'),
            f'layers/mlp/up/{kind}': Stored(f'{layer}mlp.c_fc.{k}'),
            f'layers/mlp/down/{kind}': Stored(f'{layer}mlp.c_proj.{k}')}
  return out | layer_norm('layers/mixer_norm', f'{layer}ln_1') | layer_norm(
      'layers/feed_forward_norm', f'{layer}ln_2') | layer_norm('norm', 'transformer.ln_f')


# Old checkpoints have the causal mask of each layer.
GPT2 = Family('gpt2', from_hf, to_hf, names, prefix='transformer.',
              ignored=r'(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)')
