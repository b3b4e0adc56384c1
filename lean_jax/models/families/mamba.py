"""Mamba (Gu & Dao 2023, arXiv:2312.00752); what its successor shares."""
import math

from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
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
  with_bias,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mamba import MambaOptions

DEFAULTS = dict(
    vocab_size=50280, hidden_size=768, num_hidden_layers=32, state_size=16, expand=2, conv_kernel=4,
    layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True, hidden_act='silu',
    tie_word_embeddings=True)
# A state has no greatest length, and config.json no key for it: this is what the authors trained
# with. Ours says max_position_embeddings where it is another.
CONTEXT = 2048


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  hf = DEFAULTS | hf
  width = positive(hf, 'hidden_size')
  inner = given(hf, 'intermediate_size', int(positive(hf, 'expand', float) * width))
  return DecoderConfig(**common(hf, 'mamba'), mamba=MambaOptions(
      inner=inner, rank=rank(hf, 'time_step_rank', width), **mixer(hf)))


def to_hf(c):
  """config.json of a config."""
  o = c.mamba
  return keys(c, o) | dict(          # beside intermediate_size, expand has no say
      architectures=['MambaForCausalLM'], model_type='mamba', intermediate_size=o.inner,
      expand=max(1, o.inner // c.width), time_step_rank=o.rank)


def names(c):
  """Where a checkpoint has each array; the first product's tensor is two of ours."""
  layer = 'backbone.layers.{layer}.mixer.'
  return outside() | mamba_names(layer, c.mamba)


MAMBA = Family('mamba', from_hf, to_hf, names, prefix='backbone.')


def common(hf, mixer):
  """What config.json says outside of the mixers."""
  require(hf, dict(rms_norm=(True, None)))
  layers = positive(hf, 'num_hidden_layers')
  return dict(
      vocabulary=positive(hf, 'vocab_size'), width=positive(hf, 'hidden_size'), layers=layers,
      context=given(hf, 'max_position_embeddings', CONTEXT),
      kinds=(Layer(mixer=mixer, feed_forward=None),) * layers,
      attention=AttentionOptions(ropes=()), epsilon=positive(hf, 'layer_norm_epsilon', float),
      tied=bool(hf['tie_word_embeddings']))


def mixer(hf):
  """What config.json says of either mixer."""
  return dict(
      state=positive(hf, 'state_size'), conv=positive(hf, 'conv_kernel'), bias=bool(hf['use_bias']),
      conv_bias=bool(hf['use_conv_bias']), activation=chosen(hf, 'hidden_act', ACTIVATIONS))


def rank(hf, key, width):
  """The rank of time steps in config.json: a number, or 'auto'."""
  return given({k: v for k, v in hf.items() if v != 'auto'}, key, math.ceil(width / 16))


def keys(c, options):
  """config.json outside of what is a mixer's own."""
  context = {} if c.context == CONTEXT else dict(max_position_embeddings=c.context)
  expand = options.inner / c.width
  return context | dict(
      vocab_size=c.vocabulary, hidden_size=c.width, num_hidden_layers=c.layers,
      expand=int(expand) if expand == int(expand) else expand, state_size=options.state,
      conv_kernel=options.conv, layer_norm_epsilon=c.epsilon, use_bias=options.bias,
      use_conv_bias=options.conv_bias, hidden_act=activation_name(options.activation),
      tie_word_embeddings=c.tied)


def outside():
  """Where a checkpoint has what is outside of the mixers."""
  return {'embed/table': Stored('backbone.embeddings.weight'),
          'layers/mixer_norm/scale': Stored('backbone.layers.{layer}.norm.weight'),
          'norm/scale': Stored('backbone.norm_f.weight'), 'head/kernel': linear('lm_head.weight')}


def conv_names(path, where, channels, taps):
  """Where a checkpoint has a convolution of each channel by itself."""
  return {f'{path}/kernel': Stored(f'{where}.weight', permute=(2, 0, 1), shape=(channels, 1, taps)),
          f'{path}/bias': Stored(f'{where}.bias')}


def mamba_names(where, o):
  """Where a checkpoint has the arrays of a Mamba mixer, of its options."""
  out = {f'layers/mamba/{part}/{ours}': of(f'{where}in_proj.{theirs}', sizes=(o.inner, o.inner),
                                           index=k)
         for k, part in enumerate(('in', 'gate'))
         for ours, theirs, of in (('kernel', 'weight', linear), ('bias', 'bias', Stored))}
  return out | conv_names('layers/mamba/conv', f'{where}conv1d', o.inner, o.conv) | with_bias(
      'layers/mamba/out', f'{where}out_proj') | {
          'layers/mamba/select/kernel': linear(f'{where}x_proj.weight'),
          'layers/mamba/dt/kernel': linear(f'{where}dt_proj.weight'),
          'layers/mamba/dt_bias': Stored(f'{where}dt_proj.bias'),
          'layers/mamba/A_log': Stored(f'{where}A_log'), 'layers/mamba/D': Stored(f'{where}D')}
