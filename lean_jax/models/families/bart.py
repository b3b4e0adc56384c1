"""BART (Lewis et al. 2019, arXiv:1910.13461)."""
from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
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
  token,
  with_bias,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=50265, max_position_embeddings=1024, d_model=1024, activation_function='gelu',
    encoder_layers=12, encoder_ffn_dim=4096, encoder_attention_heads=16, decoder_layers=12,
    decoder_ffn_dim=4096, decoder_attention_heads=16, scale_embedding=False,
    decoder_start_token_id=2, forced_eos_token_id=2)
ALIASES = dict(hidden_size='d_model', num_attention_heads='encoder_attention_heads',
               num_hidden_layers='encoder_layers')
# The last five are of BART's relatives, which had this model_type once.
NEUTRAL = dict(
    is_encoder_decoder=(True,), is_decoder=(False,), tie_word_embeddings=(True,),
    add_bias_logits=(False,), add_final_layer_norm=(False,), normalize_before=(False,),
    normalize_embedding=(True,), static_position_embeddings=(False,))
OFFSET = 2                    # rows of the table of positions before that of the first token


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = DEFAULTS | hf | {ours: hf[k] for k, ours in ALIASES.items() if k in hf}
  width, context = positive(hf, 'd_model'), positive(hf, 'max_position_embeddings')
  activation = chosen(hf, 'activation_function', ACTIVATIONS)

  def stack(side):
    return dict(
        **equal_heads(width, positive(hf, f'{side}_attention_heads')),
        vocabulary=positive(hf, 'vocab_size'), layers=positive(hf, f'{side}_layers'),
        hidden=positive(hf, f'{side}_ffn_dim'), context=context, positions=context + OFFSET,
        position_offset=OFFSET, embedding_norm=True, norm='layer', norm_before=False, norm_sum=True,
        final_norm=False, embedding_scale=width ** .5 if hf['scale_embedding'] else 1.,
        attention=AttentionOptions(ropes=(), bias=True, out_bias=True),
        mlp=MLPOptions(gated=False, activation=activation, bias=True))
  return EncoderDecoderConfig(
      encoder=StackConfig(causal=False, **stack('encoder')),
      decoder=DecoderConfig(cross=True, tied=True, head_bias=True, **stack('decoder')),
      start=token(hf, 'decoder_start_token_id', 2), first=token(hf, 'forced_bos_token_id'),
      last=token(hf, 'forced_eos_token_id'))


def to_hf(c):
  """config.json of a config."""
  sides = {}
  for side, stack in (('encoder', c.encoder), ('decoder', c.decoder)):
    sides |= {f'{side}_layers': stack.layers, f'{side}_ffn_dim': stack.hidden,
              f'{side}_attention_heads': stack.heads}
  return sides | dict(
      architectures=['BartForConditionalGeneration'], model_type='bart', vocab_size=c.vocabulary,
      d_model=c.width, max_position_embeddings=c.context,
      activation_function=activation_name(c.encoder.mlp.activation), is_encoder_decoder=True,
      scale_embedding=c.encoder.embedding_scale != 1, tie_word_embeddings=True,
      decoder_start_token_id=c.start, forced_bos_token_id=c.first, forced_eos_token_id=c.last)


def names(c):
  """Where a checkpoint has each array."""
  out = {'embed/table': Stored('model.shared.weight'),
         'decoder/head/kernel': linear('lm_head.weight'),
         'decoder/head_bias': Stored('final_logits_bias', shape=(1, c.vocabulary))}
  for stack in ('encoder', 'decoder'):
    ours, theirs = f'{stack}/layers', f'model.{stack}.layers.{{layer}}'
    out[f'{stack}/positions/table'] = Stored(f'model.{stack}.embed_positions.weight')
    out |= layer_norm(f'{stack}/embed_norm', f'model.{stack}.layernorm_embedding')
    for branch, name in dict(mixer='self_attn', cross='encoder_attn', feed_forward='final').items():
      out |= layer_norm(f'{ours}/{branch}_norm_sum', f'{theirs}.{name}_layer_norm')
    for branch, name in dict(attention='self_attn', cross='encoder_attn').items():
      for part, product in dict(q='q_proj', k='k_proj', v='v_proj', o='out_proj').items():
        out |= with_bias(f'{ours}/{branch}/{part}', f'{theirs}.{name}.{product}')
    out |= with_bias(f'{ours}/mlp/up', f'{theirs}.fc1')
    out |= with_bias(f'{ours}/mlp/down', f'{theirs}.fc2')
  return out


# Checkpoints of the bare model leave out the bias of the logits, which is zero.
BART = Family(
    'bart', from_hf, to_hf, names, prefix='model.', optional='final_logits_bias',
    ignored=r'(model\.)?(encoder|decoder)\.version',
    copies={f'model.{stack}.embed_tokens.weight': 'model.shared.weight'
            for stack in ('encoder', 'decoder')})
