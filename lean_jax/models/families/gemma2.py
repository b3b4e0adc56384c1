"""Gemma 2 (arXiv:2408.00118): soft caps, every other layer windowed, norms around each branch."""
import dataclasses

from lean_jax.models.families import gemma, llama
from lean_jax.models.families.base import Family, Stored, given, positive
from lean_jax.models.families.layer_types import layer_types, layers_of, window

DEFAULTS = dict(
    vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    hidden_activation='gelu_pytorch_tanh', max_position_embeddings=8192, rms_norm_eps=1e-6,
    tie_word_embeddings=True, query_pre_attn_scalar=256, sliding_window=4096,
    final_logit_softcapping=30., attn_logit_softcapping=50.)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  hf = DEFAULTS | hf
  return dataclasses.replace(shared(hf), kinds=layers_of(hf, lambda k: k % 2 == 0))


def shared(hf, **rotary):
  """Gemma's config with soft caps and norms around each branch."""
  c = gemma.shared(hf | dict(hidden_act=hf['hidden_activation']), **rotary)
  attention = dataclasses.replace(
      c.attention, scale=positive(hf, 'query_pre_attn_scalar', float) ** -.5,
      softcap=given(hf, 'attn_logit_softcapping', None, float))
  return dataclasses.replace(c, attention=attention, norm_after=True,
                             logit_softcap=given(hf, 'final_logit_softcapping', None, float))


def to_hf(c):
  """config.json of a config."""
  return shared_hf(c, 'gemma2', 'Gemma2ForCausalLM')


def shared_hf(c, model_type, architecture):
  """The inverse of `from_hf`."""
  scalar, hf = c.attention.scale ** -2, llama.shared_hf(c, model_type, architecture)
  hf.pop('hidden_act')
  return hf | dict(
      attention_bias=c.attention.bias, hidden_activation=gemma.activation(c),
      query_pre_attn_scalar=round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
      sliding_window=window(c), layer_types=layer_types(c),
      final_logit_softcapping=c.logit_softcap, attn_logit_softcapping=c.attention.softcap)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.'
  return llama.names(c) | {f'layers/{ours}/scale': Stored(f'{layer}{theirs}_layernorm.weight')
                           for ours, theirs in (('mixer_norm_after', 'post_attention'),
                                                ('feed_forward_norm', 'pre_feedforward'),
                                                ('feed_forward_norm_after', 'post_feedforward'))}


GEMMA2 = Family('gemma2', from_hf, to_hf, names, prefix='model.')
