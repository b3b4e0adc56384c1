"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108)."""
from lean_jax.models.encoder import EncoderConfig, TransformOptions
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  equal_heads,
  layer_norm,
  linear,
  positive,
  require,
  with_bias,
)
from lean_jax.models.families.bert import NEUTRAL, OLDER, POST_NORM
from lean_jax.models.families.heads import head, head_hf
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=30522, max_position_embeddings=512, n_layers=6, n_heads=12, dim=768, hidden_dim=3072,
    activation='gelu', tie_word_embeddings=True)
ALIASES = dict(hidden_size='dim', num_attention_heads='n_heads', num_hidden_layers='n_layers')


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = DEFAULTS | hf | {ours: hf[k] for k, ours in ALIASES.items() if k in hf}
  heads, context = head(hf, 'DistilBert'), positive(hf, 'max_position_embeddings')
  activation = chosen(hf, 'activation', ACTIVATIONS)
  transform = dict(masked=TransformOptions(activation, norm=True),
                   sequence=TransformOptions('relu')).get(heads['head'])
  return EncoderConfig(
      **equal_heads(positive(hf, 'dim'), positive(hf, 'n_heads')), **heads, transform=transform,
      vocabulary=positive(hf, 'vocab_size'), layers=positive(hf, 'n_layers'),
      hidden=positive(hf, 'hidden_dim'), context=context, positions=context, epsilon=1e-12,
      mlp=MLPOptions(gated=False, activation=activation, bias=True),
      tied=heads['head'] != 'masked' or bool(hf['tie_word_embeddings']), **POST_NORM)


def to_hf(c):
  """config.json of a config."""
  return dict(
      model_type='distilbert', vocab_size=c.vocabulary, dim=c.width, n_layers=c.layers,
      n_heads=c.heads, hidden_dim=c.hidden, activation=activation_name(c.mlp.activation),
      max_position_embeddings=c.context, tie_word_embeddings=c.tied, **head_hf(c, 'DistilBert'))


def names(c):
  """Where a checkpoint has each array."""
  layer = 'distilbert.transformer.layer.{layer}.'
  out = {f'{ours}/table': Stored(f'distilbert.embeddings.{theirs}_embeddings.weight')
         for ours, theirs in dict(embed='word', positions='position').items()}
  out |= layer_norm('embed_norm', 'distilbert.embeddings.LayerNorm')
  out |= layer_norm('layers/mixer_norm_sum', f'{layer}sa_layer_norm')
  out |= layer_norm('layers/feed_forward_norm_sum', f'{layer}output_layer_norm')
  for ours, theirs in dict(q='q_lin', k='k_lin', v='v_lin', o='out_lin').items():
    out |= with_bias(f'layers/attention/{ours}', f'{layer}attention.{theirs}')
  for ours, theirs in dict(up='lin1', down='lin2').items():
    out |= with_bias(f'layers/mlp/{ours}', f'{layer}ffn.{theirs}')
  if c.head == 'masked':
    bias = Stored('vocab_projector.bias')
    return (out | with_bias('transform/dense', 'vocab_transform')
            | layer_norm('transform/norm', 'vocab_layer_norm')
            | {'head/kernel': linear('vocab_projector.weight'), 'head/bias': bias,
               'head_bias': bias})
  return (out | with_bias('transform/dense', 'pre_classifier')
          | with_bias('classifier', 'classifier'))


# Whether positions began as sinusoids (sinusoidal_pos_embds) is seen in their table alone.
DISTILBERT = Family('distilbert', from_hf, to_hf, names, prefix='distilbert.', older=OLDER,
                    ignored=r'(distilbert\.)?embeddings\.position_ids')
