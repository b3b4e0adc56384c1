"""Jamba (Lieber et al. 2024, arXiv:2403.19887): some layers attend, the others are Mamba's."""
from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import llama, mamba, mixtral
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  head_shape,
  linear,
  positive,
  require,
)
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mamba import MambaOptions
from lean_jax.nn.mlp import MLPOptions
from lean_jax.nn.moe import MoEOptions
from lean_jax.nn.router import RouterOptions

DEFAULTS = dict(
    vocab_size=65536, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, hidden_act='silu', rms_norm_eps=1e-6,
    max_position_embeddings=262144, tie_word_embeddings=False, num_experts_per_tok=2,
    num_experts=16, expert_layer_period=2, expert_layer_offset=1, attn_layer_period=8,
    attn_layer_offset=4, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank='auto',
    mamba_conv_bias=True, mamba_proj_bias=False)
ALIASES = dict(num_local_experts='num_experts')
NEUTRAL = dict(sliding_window=(None,), mamba_inner_layernorms=(True,))


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, NEUTRAL)
  hf = DEFAULTS | hf | {ours: hf[k] for k, ours in ALIASES.items() if k in hf}
  width, hidden = positive(hf, 'hidden_size'), positive(hf, 'intermediate_size')
  layers, experts = positive(hf, 'num_hidden_layers'), positive(hf, 'num_experts')
  activation = chosen(hf, 'hidden_act', ACTIVATIONS)
  attends, expert = every(hf, 'attn_layer'), every(hf, 'expert_layer')
  kinds = tuple(Layer(mixer='attention' if attends(k) else 'mamba',
                      feed_forward='moe' if expert(k) and experts > 1 else 'mlp')
                for k in range(layers))
  return DecoderConfig(
      **head_shape(hf), vocabulary=positive(hf, 'vocab_size'), layers=layers, hidden=hidden,
      context=positive(hf, 'max_position_embeddings'), kinds=kinds,
      attention=AttentionOptions(ropes=()), mlp=MLPOptions(activation=activation),
      mamba=MambaOptions(
          inner=int(positive(hf, 'mamba_expand', float) * width),
          rank=mamba.rank(hf, 'mamba_dt_rank', width), state=positive(hf, 'mamba_d_state'),
          conv=positive(hf, 'mamba_d_conv'),
          bias=bool(hf['mamba_proj_bias']), conv_bias=bool(hf['mamba_conv_bias']),
          activation=activation, norm=True),
      moe=None if experts == 1 else MoEOptions(
          experts=experts, hidden=hidden, activation=activation, router=RouterOptions(
              top_k=mixtral.top_k(hf, experts), normalise=False, balance=mixtral.balance(hf))),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def to_hf(c):
  """config.json of a config.

  Raises:
    InputError: the kinds of its layers do not return at even distances.
  """
  o, router = c.mamba, c.moe and c.moe.router
  kinds = spacing(c, 'attn_layer', 'mixer', 'attention') | spacing(
      c, 'expert_layer', 'feed_forward', 'moe')
  experts = dict(num_experts=1) if c.moe is None else dict(
      num_experts=c.moe.experts, num_experts_per_tok=router.top_k,
      output_router_logits=router.balance > 0,
      router_aux_loss_coef=router.balance or mixtral.COEFFICIENT)
  return kinds | experts | dict(
      architectures=['JambaForCausalLM'], model_type='jamba', vocab_size=c.vocabulary,
      hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
      num_attention_heads=c.heads, num_key_value_heads=c.groups, rms_norm_eps=c.epsilon,
      hidden_act=activation_name(o.activation), max_position_embeddings=c.context,
      tie_word_embeddings=c.tied, mamba_d_state=o.state, mamba_d_conv=o.conv,
      mamba_expand=o.inner // c.width, mamba_dt_rank=o.rank, mamba_conv_bias=o.conv_bias,
      mamba_proj_bias=o.bias)


def names(c):
  """Where a checkpoint has each array."""
  layer = 'model.layers.{layer}.'
  out = llama.names(c) | mamba.mamba_names(f'{layer}mamba.', c.mamba)
  for ours, theirs in (('dt', 'dt'), ('B', 'b'), ('C', 'c')):
    out[f'layers/mamba/{ours}_norm/scale'] = Stored(f'{layer}mamba.{theirs}_layernorm.weight')
  for name in ('gate', 'up', 'down'):
    out[f'layers/mlp/{name}/kernel'] = linear(f'{layer}feed_forward.{name}_proj.weight')
  return out | mixtral.expert_names(
      f'{layer}feed_forward.experts.', gate='gate_proj', up='up_proj', down='down_proj') | {
          'layers/moe/router/kernel': linear(f'{layer}feed_forward.router.weight'),
          'layers/feed_forward_norm/scale': Stored(f'{layer}pre_ff_layernorm.weight'),
          'norm/scale': Stored('model.final_layernorm.weight')}


JAMBA = Family('jamba', from_hf, to_hf, names, prefix='model.')


def every(hf, what):
  """The function from a layer's number to whether config.json makes it one of `what`."""
  period, offset = positive(hf, f'{what}_period'), hf[f'{what}_offset']
  if not isinstance(offset, int) or not 0 <= offset < period:
    raise InputError(f'config.json has {what}_offset = {offset!r} and {what}_period = {period}; '
                     'the first must be at least 0 and below the second')
  return lambda layer: layer % period == offset


def spacing(c, what, branch, kind):
  """The period and the offset of the layers whose `branch` is of a kind."""
  at = [k for k, layer in enumerate(c.each) if getattr(layer, branch) == kind]
  period = at[1] - at[0] if len(at) > 1 else c.layers + 1
  offset = at[0] if at else c.layers
  if at != list(range(offset, c.layers, period)) or offset >= period:
    raise InputError(f'layers {at} of {c.layers} are of kind {kind}, and config.json of jamba has '
                     'only a period and an offset for them; keep layers at even distances')
  return {f'{what}_period': period, f'{what}_offset': offset}
