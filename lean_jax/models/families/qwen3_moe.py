"""Qwen3's mixtures of experts (Qwen Team 2025, arXiv:2505.09388)."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.families import llama, mixtral
from lean_jax.models.families.base import Family, given, linear, positive, require
from lean_jax.models.stack import Layer
from lean_jax.nn.mlp import MLPOptions

DEFAULTS = dict(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=24,
    num_attention_heads=32, num_key_value_heads=4, hidden_act='silu', max_position_embeddings=32768,
    rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False, use_sliding_window=False,
    sliding_window=4096, decoder_sparse_step=1, moe_intermediate_size=768, num_experts_per_tok=8,
    num_experts=128, norm_topk_prob=False, mlp_only_layers=None, rope_theta=10_000.)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, {})
  hf = DEFAULTS | hf
  # transformers 5 writes num_local_experts
  hf['num_local_experts'] = hf.get('num_local_experts', hf['num_experts'])
  window = given(hf, 'sliding_window', None) if hf['use_sliding_window'] else None
  c = mixtral.from_hf({k: v for k, v in hf.items() if k != 'attention_bias'})
  bias, step = bool(hf['attention_bias']), positive(hf, 'decoder_sparse_step')
  dense = hf['mlp_only_layers'] or []
  kinds = tuple(Layer(feed_forward='mlp' if k in dense or (k + 1) % step else 'moe', window=window)
                for k in range(c.layers))
  if not any(layer.feed_forward == 'moe' for layer in kinds):
    raise InputError('config.json has no layer of experts (mlp_only_layers, decoder_sparse_step); '
                     'give it as model_type qwen3')
  replace = dataclasses.replace
  return replace(
      c, kinds=kinds, hidden=positive(hf, 'intermediate_size'),
      attention=replace(c.attention, norm='head', bias=bias, out_bias=bias),
      mlp=MLPOptions(activation=c.moe.activation),
      moe=replace(c.moe, hidden=positive(hf, 'moe_intermediate_size'),
                  router=replace(c.moe.router, normalise=bool(hf['norm_topk_prob']))))


def to_hf(c):
  """config.json of a config."""
  window = mixtral.window(c)
  return llama.to_hf(c) | mixtral.common(c) | dict(
      architectures=['Qwen3MoeForCausalLM'], model_type='qwen3_moe',
      attention_bias=c.attention.bias,
      use_sliding_window=window is not None, sliding_window=window, decoder_sparse_step=1,
      mlp_only_layers=[k for k, layer in enumerate(c.each) if layer.feed_forward == 'mlp'],
      moe_intermediate_size=c.moe.hidden, num_experts=c.moe.experts,
      norm_topk_prob=c.moe.router.normalise)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.mlp.'
  return llama.names(c) | {'layers/moe/router/kernel': linear(f'{layer}gate.weight')} | (
      mixtral.expert_names(f'{layer}experts.', gate='gate_proj', up='up_proj', down='down_proj'))


QWEN3_MOE = Family('qwen3_moe', from_hf, to_hf, names, prefix='model.')
