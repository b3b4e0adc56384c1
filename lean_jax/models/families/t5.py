"""T5 (Raffel et al. 2019, arXiv:1910.10683): v1.0 with a tied head, v1.1 and Flan without."""
from lean_jax.errors import InputError
from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  given,
  linear,
  positive,
  require,
  token,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions
from lean_jax.nn.relative import RelativeOptions

DEFAULTS = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_decoder_layers=None,
    num_heads=8, relative_attention_num_buckets=32, relative_attention_max_distance=128,
    layer_norm_epsilon=1e-6, feed_forward_proj='relu', n_positions=512, tie_word_embeddings=True,
    pad_token_id=0)
ALIASES = dict(hidden_size='d_model', head_dim='d_kv', num_attention_heads='num_heads',
               num_hidden_layers='num_layers')
NEUTRAL = dict(is_encoder_decoder=(True,), is_decoder=(False,))


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = DEFAULTS | hf | {ours: hf[k] for k, ours in ALIASES.items() if k in hf}
  width, heads = positive(hf, 'd_model'), positive(hf, 'num_heads')
  layers, tied = positive(hf, 'num_layers'), hf['tie_word_embeddings'] is not False
  both = dict(
      vocabulary=positive(hf, 'vocab_size'), width=width, heads=heads, groups=heads,
      head_width=positive(hf, 'd_kv'), hidden=positive(hf, 'd_ff'),
      context=positive(hf, 'n_positions'), epsilon=positive(hf, 'layer_norm_epsilon', float),
      relative=relative(hf), attention=AttentionOptions(ropes=(), scale=1.), mlp=feed_forward(hf))
  # A checkpoint that ties divides by the root of the width; transformers 5 has a key for it.
  scaled = hf.get('scale_decoder_outputs', tied)
  return EncoderDecoderConfig(
      encoder=StackConfig(layers=layers, causal=False, **both),
      decoder=DecoderConfig(
          layers=given(hf, 'num_decoder_layers', layers), cross=True, tied=tied,
          logit_scale=width ** -.5 if scaled else 1., **both),
      start=token(hf, 'decoder_start_token_id', token(hf, 'pad_token_id', 0)),
      first=token(hf, 'forced_bos_token_id'), last=token(hf, 'forced_eos_token_id'))


def relative(hf):
  """The buckets of distances; raises InputError if there are too few for them."""
  buckets = positive(hf, 'relative_attention_num_buckets')
  farthest = positive(hf, 'relative_attention_max_distance')
  if buckets < 4 or buckets % 2 or farthest <= buckets // 2:
    raise InputError(f'config.json has {buckets} buckets for distances up to {farthest}; expected '
                     'an even number, 4 or more, and distances beyond its half')
  return RelativeOptions(buckets, farthest)


def feed_forward(hf):
  """The options of the feed-forward block: 'relu', 'gated-gelu', ..."""
  *before, name = str(hf['feed_forward_proj']).split('-')
  if before not in ([], ['gated']):
    raise InputError(f'config.json has feed_forward_proj = {hf["feed_forward_proj"]!r}, expected '
                     'an activation, or gated- and one')
  # The gated gelu of v1.1 is the approximate one. Two keys that follow from this one override it.
  name = 'gelu_new' if before and name == 'gelu' else name
  key = 'dense_act_fn' if 'dense_act_fn' in hf else 'feed_forward_proj'
  return MLPOptions(gated=bool(hf.get('is_gated_act', before)),
                    activation=chosen({key: hf.get('dense_act_fn', name)}, key, ACTIVATIONS))


def to_hf(c):
  """config.json of a config."""
  e, d = c.encoder, c.decoder
  name = activation_name(e.mlp.activation)
  return dict(
      architectures=['T5ForConditionalGeneration'], model_type='t5', vocab_size=e.vocabulary,
      d_model=e.width, d_kv=e.head_width, d_ff=e.hidden, num_layers=e.layers,
      num_decoder_layers=d.layers, num_heads=e.heads, n_positions=e.context,
      relative_attention_num_buckets=e.relative.buckets,
      relative_attention_max_distance=e.relative.distance, layer_norm_epsilon=e.epsilon,
      feed_forward_proj=('gated-' + name.removesuffix('_new')) if e.mlp.gated else name,
      dense_act_fn=name, is_gated_act=e.mlp.gated, is_encoder_decoder=True,
      tie_word_embeddings=d.tied, scale_decoder_outputs=d.logit_scale != 1,
      decoder_start_token_id=c.start, forced_bos_token_id=c.first, forced_eos_token_id=c.last)


def names(c):
  """Where a checkpoint has each array; the first layer has the scores of distances."""
  out = {'embed/table': Stored('shared.weight'), 'decoder/head/kernel': linear('lm_head.weight')}
  for stack, branches in (('encoder', ('mixer', 'feed_forward')),
                          ('decoder', ('mixer', 'cross', 'feed_forward'))):
    for n, branch in enumerate(branches):
      ours, theirs = f'{stack}/layers', f'{stack}.block.{{layer}}.layer.{n}'
      out[f'{ours}/{branch}_norm/scale'] = Stored(f'{theirs}.layer_norm.weight')
      for part, name in parts_of(branch, c.encoder.mlp.gated).items():
        out[f'{ours}/{part}/kernel'] = linear(f'{theirs}.{name}.weight')
    table = f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    out |= {f'{stack}/relative/table': Stored(table),
            f'{stack}/norm/scale': Stored(f'{stack}.final_layer_norm.weight')}
  return out


def parts_of(branch, gated):
  """{our product in a branch: theirs}."""
  if branch == 'mixer':
    return {f'attention/{k}': f'SelfAttention.{k}' for k in 'qkvo'}
  if branch == 'cross':
    return {f'cross/{k}': f'EncDecAttention.{k}' for k in 'qkvo'}
  up = dict(gate='wi_0', up='wi_1') if gated else dict(up='wi')
  return {f'mlp/{k}': f'DenseReluDense.{name}' for k, name in (up | dict(down='wo')).items()}


# Old checkpoints have the table again in each stack, and one of distances to the encoder, unused.
T5 = Family(
    't5', from_hf, to_hf, names, own_head=True,
    ignored=r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
    copies={f'{stack}.embed_tokens.weight': 'shared.weight' for stack in ('encoder', 'decoder')})
