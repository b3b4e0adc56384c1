"""ModernBERT (Warner et al. 2024, arXiv:2412.13663)."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.encoder import EncoderConfig, TransformOptions
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
from lean_jax.models.families.bert import NEUTRAL
from lean_jax.models.families.heads import head, head_hf
from lean_jax.models.families.layer_types import layer_types, layers_of
from lean_jax.models.families.rope_config import context, rope_hf, ropes
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=50368, hidden_size=768, intermediate_size=1152, num_hidden_layers=22,
    num_attention_heads=12, hidden_activation='gelu', max_position_embeddings=8192, norm_eps=1e-5,
    norm_bias=False, attention_bias=False, local_attention=128, mlp_bias=False, decoder_bias=True,
    classifier_pooling='cls', classifier_bias=False, classifier_activation='gelu',
    tie_word_embeddings=True)
# What this family calls what others call so.
ROTARY = dict(rope_theta='global_rope_theta', rope_local_base_freq='local_rope_theta')


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  heads = head(hf, 'ModernBert')
  hf = DEFAULTS | hf
  # Tokens on each side that a layer of local attention sees, its own included, are one more.
  window = hf['local_attention'] // 2 if isinstance(hf['local_attention'], int) else None
  require(hf, NEUTRAL | dict(rope_scaling=(None,), sliding_window=(None, window)))
  shape = equal_heads(positive(hf, 'hidden_size'), positive(hf, 'num_attention_heads'))
  rotary = ropes(hf | {key: hf.get(own) for key, own in ROTARY.items()}, shape['head_width'],
                 theta=160_000., local_theta=10_000.)
  every, bias = given(hf, 'global_attn_every_n_layers', 3), bool(hf['attention_bias'])
  layers = layers_of(hf | dict(sliding_window=1 + positive(hf, 'local_attention') // 2),
                     lambda k: k % every, rotary=1)
  transform = TransformOptions(chosen(hf, 'classifier_activation', ACTIVATIONS),
                               bias=bool(hf['classifier_bias']), norm=True)
  return EncoderConfig(
      **shape, **heads, kinds=(dataclasses.replace(layers[0], mixer_norm=False), *layers[1:]),
      transform=transform if heads['head'] else None,
      reads=chosen(hf, 'classifier_pooling', dict(cls='cls', mean='mean')),
      vocabulary=positive(hf, 'vocab_size'), layers=len(layers),
      hidden=positive(hf, 'intermediate_size'), context=context(hf, rotary), norm='layer',
      epsilon=positive(hf, 'norm_eps', float), norm_bias=bool(hf['norm_bias']), embedding_norm=True,
      attention=AttentionOptions(ropes=rotary, bias=bias, out_bias=bias),
      mlp=MLPOptions(activation=chosen(hf, 'hidden_activation', ACTIVATIONS),
                     bias=bool(hf['mlp_bias'])),
      tied=bool(hf['tie_word_embeddings']), head_bias=bool(hf['decoder_bias']))


def to_hf(c):
  """config.json of a config.

  Raises:
    InputError: its first layer normalises its input, or another does not.
  """
  if [layer.mixer_norm for layer in c.each] != [k > 0 for k in range(c.layers)]:
    raise InputError('the first layer of a modernbert, and no other, leaves its input as it is; '
                     'keep layer 0, and only as the first')
  window = next((layer.window for layer in c.each if layer.window is not None), None)
  scaled = any(rope.scaling is not None for rope in c.attention.ropes)
  rotary = {ROTARY.get(k, k): v for k, v in rope_hf(
      c.attention.ropes, c.context, each=scaled).items() if k != 'rope_scaling'}
  period = next((n for n in range(1, c.layers + 1) if [k % n > 0 for k in range(c.layers)]
                 == [layer.window is not None for layer in c.each]), None)
  out = dict(
      model_type='modernbert', vocab_size=c.vocabulary, hidden_size=c.width,
      intermediate_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
      hidden_activation=activation_name(c.mlp.activation), norm_eps=c.epsilon,
      norm_bias=c.norm_bias, attention_bias=c.attention.bias, mlp_bias=c.mlp.bias,
      decoder_bias=c.head_bias, classifier_pooling=c.reads, layer_types=layer_types(c),
      tie_word_embeddings=c.tied, **rotary, **head_hf(c, 'ModernBert'))
  if window is not None:
    out['local_attention'] = 2 * (window - 1)
  if period is not None:                               # transformers 4 knows no layer_types
    out['global_attn_every_n_layers'] = period
  if c.transform is not None:
    out |= dict(classifier_bias=c.transform.bias,
                classifier_activation=activation_name(c.transform.activation))
  return out


def names(c):
  """Where a checkpoint has each array."""
  layer, out = 'model.layers.{layer}.', {'embed/table': Stored(
      'model.embeddings.tok_embeddings.weight')}
  for ours, theirs in (('embed_norm', 'model.embeddings.norm'), ('norm', 'model.final_norm'),
                       ('layers/mixer_norm', f'{layer}attn_norm'),
                       ('layers/feed_forward_norm', f'{layer}mlp_norm'),
                       ('transform/norm', 'head.norm')):
    out |= layer_norm(ours, theirs)
  for kind, suffix, of in (('kernel', 'weight', linear), ('bias', 'bias', Stored)):
    split = (('attention', 'qkv', 'attn.Wqkv', [c.width] * 3),
             ('mlp', ('gate', 'up'), 'mlp.Wi', [c.hidden] * 2))
    for block, ours, theirs, sizes in split:
      for part, stored in zip(ours, parts(f'{layer}{theirs}.{suffix}', sizes, of=of)):
        out[f'layers/{block}/{part}/{kind}'] = stored
    for ours, theirs in (('layers/attention/o', f'{layer}attn.Wo'),
                         ('layers/mlp/down', f'{layer}mlp.Wo'), ('transform/dense', 'head.dense'),
                         ('classifier', 'classifier'), ('head', 'decoder')):
      out[f'{ours}/{kind}'] = of(f'{theirs}.{suffix}')
  return out | {'head_bias': Stored('decoder.bias')}


MODERNBERT = Family('modernbert', from_hf, to_hf, names, prefix='model.')
