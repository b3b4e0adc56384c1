"""Mixtral (Jiang et al. 2024, arXiv:2401.04088), Llama with experts; what such families share."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.families import llama
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  activation_name,
  chosen,
  given,
  linear,
  positive,
  require,
)
from lean_jax.models.families.layer_types import same_layers, window
from lean_jax.nn.moe import MoEOptions
from lean_jax.nn.router import RouterOptions

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, hidden_act='silu',
    max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    num_experts_per_tok=2, num_local_experts=8)
COEFFICIENT = .001            # router_aux_loss_coef, where output_router_logits asks for the loss


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(router_jitter_noise=(0, None), attention_bias=(False, None),
                   mlp_bias=(False, None)))
  hf = DEFAULTS | hf
  kinds = tuple(dataclasses.replace(layer, feed_forward='moe') for layer in same_layers(hf))
  return dataclasses.replace(
      llama.shared(hf, theta=1e6), kinds=kinds, moe=experts(hf, 'num_local_experts',
                                                            'intermediate_size'))


def experts(hf, count, hidden, **router):
  """The options of experts in config.json, their number and width under these keys."""
  number = positive(hf, count)
  return MoEOptions(
      experts=number, hidden=positive(hf, hidden), activation=chosen(hf, 'hidden_act', ACTIVATIONS),
      router=RouterOptions(top_k=top_k(hf, number), balance=balance(hf), **router))


def top_k(hf, experts):
  """num_experts_per_tok of config.json.

  Raises:
    InputError: there are not so many experts.
  """
  k = positive(hf, 'num_experts_per_tok')
  if k > experts:
    raise InputError(f'config.json has num_experts_per_tok = {k} and {experts} experts; a token '
                     'cannot use more than there are')
  return k


def balance(hf):
  """The coefficient of the load-balancing loss that config.json asks for."""
  asked = hf.get('output_router_logits')
  return given(hf, 'router_aux_loss_coef', COEFFICIENT, float) if asked else 0.


def to_hf(c):
  """config.json of a config."""
  return llama.shared_hf(c, 'mixtral', 'MixtralForCausalLM') | router_hf(c) | dict(
      sliding_window=window(c), intermediate_size=c.moe.hidden, num_local_experts=c.moe.experts)


def router_hf(c):
  """Keys of config.json that say what `experts` reads, but for their number and width."""
  router = c.moe.router
  return dict(
      hidden_act=activation_name(c.moe.activation), num_experts_per_tok=router.top_k,
      output_router_logits=router.balance > 0, router_aux_loss_coef=router.balance or COEFFICIENT)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.block_sparse_moe.'
  return llama.names(c) | {'layers/moe/router/kernel': linear(f'{layer}gate.weight')} | (
      expert_names(f'{layer}experts.', gate='w1', up='w3', down='w2'))


def expert_names(where, **names):
  """Where a checkpoint has the matrices of each expert, a tensor for each."""
  return {f'layers/moe/experts/{ours}/kernel': linear(f'{where}{{expert}}.{theirs}.weight')
          for ours, theirs in names.items()}


MIXTRAL = Family('mixtral', from_hf, to_hf, names, prefix='model.')
