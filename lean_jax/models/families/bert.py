"""BERT (Devlin et al. 2018, arXiv:1810.04805), MiniLM, and what encoders like it share."""
import dataclasses

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
from lean_jax.models.families.heads import head, head_hf
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
    intermediate_size=3072, hidden_act='gelu', max_position_embeddings=512, type_vocab_size=2,
    layer_norm_eps=1e-12)
# Encoders see all tokens whatever is_causal says.
NEUTRAL = dict(
    is_decoder=(False,), is_encoder_decoder=(False,), add_cross_attention=(False,),
    position_embedding_type=('absolute', None), pruned_heads=({}, None), is_causal=(True, False))
# What the first checkpoints called a norm's scale and bias.
OLDER = {'LayerNorm.gamma': 'LayerNorm.weight', 'LayerNorm.beta': 'LayerNorm.bias'}


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  heads = head(hf, 'Bert', more=dict(ForPreTraining='masked'))
  hf = DEFAULTS | hf
  c = shared(hf, positive(hf, 'max_position_embeddings'), **heads)
  return dataclasses.replace(c, transform=transform(c, c.mlp.activation, pooler(hf)))


def pooler(hf):
  """Whether a model without a head has a pooler: unless config.json, a key of ours, says it not."""
  return bool(hf.get('add_pooling_layer', True))


def transform(c, activation, pooler):
  """What BERT and RoBERTa have before a head: tanh for sequences, else an activation and a norm."""
  return {'masked': TransformOptions(activation, norm=True), 'sequence': TransformOptions('tanh'),
          'token': None, None: TransformOptions('tanh') if pooler else None}[c.head]


def shared(hf, context, offset=0, **heads):
  """The config of the keys that BERT and RoBERTa have in common."""
  # Without tied embeddings transformers has a bias in the head's product and another beside it.
  require(hf, NEUTRAL | (dict(tie_word_embeddings=(True,)) if heads['head'] == 'masked' else {}))
  return EncoderConfig(
      **equal_heads(positive(hf, 'hidden_size'), positive(hf, 'num_attention_heads')), **heads,
      vocabulary=positive(hf, 'vocab_size'), layers=positive(hf, 'num_hidden_layers'),
      hidden=positive(hf, 'intermediate_size'), context=context,
      positions=positive(hf, 'max_position_embeddings'), position_offset=offset,
      token_types=positive(hf, 'type_vocab_size'), epsilon=positive(hf, 'layer_norm_eps', float),
      mlp=MLPOptions(gated=False, activation=chosen(hf, 'hidden_act', ACTIVATIONS), bias=True),
      **POST_NORM)


# Sums are normalised, the embeddings' too; every product has a bias; positions are learned.
POST_NORM = dict(norm='layer', norm_before=False, norm_sum=True, final_norm=False,
                 embedding_norm=True,
                 attention=AttentionOptions(ropes=(), bias=True, out_bias=True))


def to_hf(c):
  """config.json of a config."""
  return shared_hf(c, 'bert', 'Bert')


def shared_hf(c, model_type, name):
  """The inverse of `shared`."""
  out = dict(
      model_type=model_type, vocab_size=c.vocabulary, hidden_size=c.width,
      num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=c.hidden,
      hidden_act=activation_name(c.mlp.activation), max_position_embeddings=c.positions,
      type_vocab_size=c.token_types, layer_norm_eps=c.epsilon, **head_hf(c, name))
  return out | (dict(add_pooling_layer=False) if c.head is None and c.transform is None else {})


def names(c):
  """Where a checkpoint has each array."""
  if c.head == 'masked':
    last = (with_bias('transform/dense', 'cls.predictions.transform.dense')
            | layer_norm('transform/norm', 'cls.predictions.transform.LayerNorm')
            | {'head_bias': Stored('cls.predictions.bias'),
               'head/kernel': linear('cls.predictions.decoder.weight')})
  else:
    last = (with_bias('transform/dense', 'bert.pooler.dense')
            | with_bias('classifier', 'classifier'))
  return body('bert') | last


def body(prefix):
  """Where a checkpoint of BERT or RoBERTa has each array but a head's."""
  layer, out = f'{prefix}.encoder.layer.{{layer}}.', {}
  for ours, theirs in dict(embed='word', positions='position', token_types='token_type').items():
    out[f'{ours}/table'] = Stored(f'{prefix}.embeddings.{theirs}_embeddings.weight')
  out |= layer_norm('embed_norm', f'{prefix}.embeddings.LayerNorm')
  for ours, theirs in dict(q='self.query', k='self.key', v='self.value', o='output.dense').items():
    out |= with_bias(f'layers/attention/{ours}', f'{layer}attention.{theirs}')
  for ours, theirs in dict(up='intermediate', down='output').items():
    out |= with_bias(f'layers/mlp/{ours}', f'{layer}{theirs}.dense')
  for ours, theirs in dict(mixer='attention.output', feed_forward='output').items():
    out |= layer_norm(f'layers/{ours}_norm_sum', f'{layer}{theirs}.LayerNorm')
  return out


def settle(c, tensors):
  """The config, without the pooler that a checkpoint of the bare model lacks."""
  if c.head is None and not any('.pooler.' in name for name in tensors):
    return dataclasses.replace(c, transform=None)
  return c


def ignored(prefix):
  """Tensors of BERT and RoBERTa that are no parameters, or of no use where they are found."""
  return rf'({prefix}\.)?(embeddings\.position_ids|pooler\..*)|cls\.seq_relationship\..*'


BERT = Family('bert', from_hf, to_hf, names, prefix='bert.', ignored=ignored('bert'), older=OLDER,
              settle=settle, copies={'cls.predictions.decoder.bias': 'cls.predictions.bias'})
