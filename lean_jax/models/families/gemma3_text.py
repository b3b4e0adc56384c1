"""Gemma 3's text models (arXiv:2503.19786): windowed layers and others, each with its positions."""
import dataclasses

from lean_jax.models.families import gemma2
from lean_jax.models.families.base import Family, given, require
from lean_jax.models.families.layer_types import layers_of

DEFAULTS = gemma2.DEFAULTS | dict(
    vocab_size=262208, max_position_embeddings=131072, final_logit_softcapping=None,
    attn_logit_softcapping=None)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(attn_logit_softcapping=(None,)))    # which transformers reads, and forgets
  hf = DEFAULTS | hf
  period = given(hf, 'sliding_window_pattern', 6)
  c = gemma2.shared(hf, theta=1e6, local_theta=1e4)
  return dataclasses.replace(
      c, kinds=layers_of(hf, lambda k: (k + 1) % period, rotary=1),
      attention=dataclasses.replace(c.attention, norm='head'))


def to_hf(c):
  """config.json of a config."""
  return gemma2.shared_hf(c, 'gemma3_text', 'Gemma3ForCausalLM')


GEMMA3_TEXT = Family('gemma3_text', from_hf, to_hf, gemma2.names, prefix='model.')
