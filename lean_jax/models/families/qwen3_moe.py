"""Qwen3's mixtures of experts (Qwen Team 2025, arXiv:2505.09388)."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.families import llama, mixtral
from lean_jax.models.families.base import Family, linear, positive, require
from lean_jax.models.families.layer_types import same_layers, window

DEFAULTS = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
    num_attention_heads=32, num_key_value_heads=4, hidden_act='silu', max_position_embeddings=32768,
    rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False, sliding_window=4096,
    decoder_sparse_step=1, mlp_only_layers=None, moe_intermediate_size=768, num_experts_per_tok=8,
    num_experts=128, norm_topk_prob=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(mlp_bias=(False, None)))
  hf = DEFAULTS | hf
  if not hf['use_sliding_window']:
    hf['sliding_window'] = None
  c, replace = llama.shared(hf), dataclasses.replace
  step, dense = positive(hf, 'decoder_sparse_step'), hf['mlp_only_layers'] or []
  if not isinstance(dense, list) or not set(map(type, dense)) <= {int}:
    raise InputError(f'config.json has mlp_only_layers = {dense!r}, expected numbers of layers; '
                     'download it again')
  kinds = tuple(replace(layer, feed_forward='mlp' if k in dense or (k + 1) % step else 'moe')
                for k, layer in enumerate(same_layers(hf)))
  if not any(layer.feed_forward == 'moe' for layer in kinds):
    raise InputError(f'config.json has no layer of experts, with mlp_only_layers = {dense} '
                     f'and decoder_sparse_step = {step}; give it as model_type qwen3')
  # transformers 5 writes num_local_experts.
  count = 'num_local_experts' if 'num_local_experts' in hf else 'num_experts'
  return replace(
      c, kinds=kinds, attention=replace(c.attention, norm='head'),
      moe=mixtral.experts(hf, count, 'moe_intermediate_size', normalise=bool(hf['norm_topk_prob'])))


def to_hf(c):
  """config.json of a config."""
  near = window(c)
  return llama.shared_hf(c, 'qwen3_moe', 'Qwen3MoeForCausalLM') | mixtral.router_hf(c) | dict(
      attention_bias=c.attention.bias, use_sliding_window=near is not None, sliding_window=near,
      mlp_only_layers=[k for k, layer in enumerate(c.each) if layer.feed_forward == 'mlp'],
      decoder_sparse_step=1, moe_intermediate_size=c.moe.hidden, num_experts=c.moe.experts,
      norm_topk_prob=c.moe.router.normalise)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.mlp.'
  return llama.names(c) | {'layers/moe/router/kernel': linear(f'{layer}gate.weight')} | (
      mixtral.expert_names(f'{layer}experts.', gate='gate_proj', up='up_proj', down='down_proj'))


QWEN3_MOE = Family('qwen3_moe', from_hf, to_hf, names, prefix='model.')
