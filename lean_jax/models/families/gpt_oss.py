"""gpt-oss (OpenAI 2025, arXiv:2508.10925): attention sinks, every other layer windowed, experts."""
import dataclasses

from lean_jax.models.families import llama, mixtral
from lean_jax.models.families.base import Family, Stored, linear, parts, positive, require
from lean_jax.models.families.layer_types import layer_types, layers_of, window

DEFAULTS = dict(
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, head_dim=64,
    num_attention_heads=64, num_key_value_heads=8, sliding_window=128, hidden_act='silu',
    max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    attention_bias=True, num_experts_per_tok=4, num_local_experts=128, swiglu_alpha=1.702,
    swiglu_limit=7.)
YARN = dict(rope_type='yarn', factor=32., beta_fast=32., beta_slow=1., truncate=False,
            original_max_position_embeddings=4096)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(hidden_act=('silu',), mlp_bias=(False, None)))   # experts have their own kind
  hf = DEFAULTS | hf
  if not (hf.get('rope_scaling') or hf.get('rope_parameters')):
    hf['rope_parameters'] = YARN
  c, replace = llama.shared(hf, theta=150_000.), dataclasses.replace
  moe = mixtral.experts(hf, 'num_local_experts', 'intermediate_size', scores='logits', bias=True)
  layers = layers_of(hf, lambda k: k % 2 == 0)
  return replace(
      c, attention=replace(c.attention, sinks=True),
      kinds=tuple(replace(layer, feed_forward='moe') for layer in layers),
      moe=replace(moe, bias=True, limit=positive(hf, 'swiglu_limit', float),
                  alpha=positive(hf, 'swiglu_alpha', float)))


def to_hf(c):
  """config.json of a config."""
  theirs = llama.shared_hf(c, 'gpt_oss', 'GptOssForCausalLM') | mixtral.router_hf(c)
  return theirs | dict(
      attention_bias=c.attention.bias, intermediate_size=c.moe.hidden, sliding_window=window(c),
      num_local_experts=c.moe.experts, swiglu_limit=c.moe.limit, swiglu_alpha=c.moe.alpha,
      layer_types=layer_types(c),
      rope_scaling=theirs['rope_scaling'] or dict(rope_type='default'))


def names(c):
  """Where a checkpoint has each array. Columns of the experts' gate and up take turns."""
  layer, out = 'model.layers.{layer}.', llama.names(c)
  router, experts, F = f'{layer}mlp.router.', f'{layer}mlp.experts.', c.moe.hidden
  turns = dict(sizes=(1, 1), repeats=F, of=Stored)
  for ours, axis, theirs in (('kernel', 2, 'gate_up_proj'), ('bias', 1, 'gate_up_proj_bias')):
    for part, stored in zip(('gate', 'up'), parts(f'{experts}{theirs}', axis=axis, **turns)):
      out[f'layers/moe/experts/{part}/{ours}'] = stored
  return out | {
      'layers/attention/sinks': Stored(f'{layer}self_attn.sinks'),
      'layers/moe/experts/down/kernel': Stored(f'{experts}down_proj'),
      'layers/moe/experts/down/bias': Stored(f'{experts}down_proj_bias'),
      'layers/moe/router/kernel': linear(f'{router}weight'),
      'layers/moe/router/bias': Stored(f'{router}bias')}


GPT_OSS = Family('gpt_oss', from_hf, to_hf, names, prefix='model.')
