"""Mixtral (Jiang et al. 2024, arXiv:2401.04088), Llama with experts; what such families share."""
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import llama
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  activation_name,
  chosen,
  given,
  head_shape,
  linear,
  positive,
  require,
  rope_theta,
)
from lean_jax.models.stack import Layer
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.moe import MoEOptions
from lean_jax.nn.rope import Rope
from lean_jax.nn.router import RouterOptions

DEFAULTS = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, hidden_act='silu',
    max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6, tie_word_embeddings=False,
    sliding_window=None, num_experts_per_tok=2, num_local_experts=8)
COEFFICIENT = .001            # router_aux_loss_coef, where output_router_logits asks for the loss


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(router_jitter_noise=(0, None), attention_bias=(False, None)))
  hf = DEFAULTS | hf
  experts, layers = positive(hf, 'num_local_experts'), positive(hf, 'num_hidden_layers')
  hidden = positive(hf, 'intermediate_size')
  return DecoderConfig(
      **head_shape(hf), vocabulary=positive(hf, 'vocab_size'), layers=layers, hidden=hidden,
      context=positive(hf, 'max_position_embeddings'),
      kinds=(Layer(feed_forward='moe', window=given(hf, 'sliding_window', None)),) * layers,
      attention=AttentionOptions(ropes=(Rope(theta=rope_theta(hf)),)),
      moe=MoEOptions(experts=experts, hidden=hidden,
                     activation=chosen(hf, 'hidden_act', ACTIVATIONS),
                     router=RouterOptions(top_k=top_k(hf, experts), balance=balance(hf))),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config."""
  return llama.to_hf(c) | common(c) | dict(
      architectures=['MixtralForCausalLM'], model_type='mixtral', num_local_experts=c.moe.experts,
      intermediate_size=c.moe.hidden)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.block_sparse_moe.'
  return llama.names(c) | {'layers/moe/router/kernel': linear(f'{layer}gate.weight')} | (
      expert_names(f'{layer}experts.', gate='w1', up='w3', down='w2'))


MIXTRAL = Family('mixtral', from_hf, to_hf, names, prefix='model.')


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


def common(c):
  """Keys that these families have beside Llama's, of a config."""
  router = c.moe.router
  return dict(
      hidden_act=activation_name(c.moe.activation), sliding_window=window(c),
      num_experts_per_tok=router.top_k, output_router_logits=router.balance > 0,
      router_aux_loss_coef=router.balance or COEFFICIENT)


def window(c):
  """The window of the layers that have one."""
  return next((layer.window for layer in c.each if layer.window is not None), None)


def expert_names(where, **names):
  """Where a checkpoint has the matrices of each expert, a tensor for each."""
  return {f'layers/moe/experts/{ours}/kernel': linear(f'{where}{{expert}}.{theirs}.weight')
          for ours, theirs in names.items()}
