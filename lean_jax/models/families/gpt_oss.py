"""gpt-oss (OpenAI 2025, arXiv:2508.10925): attention sinks, every other layer windowed, experts."""
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import llama, mixtral
from lean_jax.models.families.base import (
  Family,
  Stored,
  head_shape,
  linear,
  parts,
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
    vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=36, head_dim=64,
    num_attention_heads=64, num_key_value_heads=8, sliding_window=128, layer_types=None,
    max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False,
    attention_bias=True, num_experts_per_tok=4, num_local_experts=128, swiglu_alpha=1.702,
    swiglu_limit=7., hidden_act='silu', rope_theta=150_000.)
WINDOWED = dict(sliding_attention=True, full_attention=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  require(hf, dict(hidden_act=('silu',)))          # of which the model has its own kind
  hf = DEFAULTS | hf
  layers, experts = positive(hf, 'num_hidden_layers'), positive(hf, 'num_local_experts')
  bias = bool(hf['attention_bias'])
  return DecoderConfig(
      **head_shape(hf), vocabulary=positive(hf, 'vocab_size'), layers=layers,
      context=positive(hf, 'max_position_embeddings'),
      kinds=tuple(Layer(feed_forward='moe', window=positive(hf, 'sliding_window') if near else None)
                  for near in windowed(hf, layers)),
      attention=AttentionOptions(ropes=(Rope(theta=rope_theta(hf)),), bias=bias, out_bias=bias,
                                 sinks=True),
      moe=MoEOptions(
          experts=experts, hidden=positive(hf, 'intermediate_size'), bias=True,
          limit=positive(hf, 'swiglu_limit', float), alpha=positive(hf, 'swiglu_alpha', float),
          router=RouterOptions(top_k=mixtral.top_k(hf, experts), scores='logits', bias=True,
                               balance=mixtral.balance(hf))),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def windowed(hf, layers):
  """Whether each layer has the window: every other one, if config.json does not say.

  Raises:
    InputError: it says what these layers cannot be.
  """
  kinds = hf['layer_types'] or [list(WINDOWED)[k % 2] for k in range(layers)]
  if len(kinds) != layers or not set(kinds) <= set(WINDOWED):
    raise InputError(f'config.json has layer_types = {kinds!r}, expected one of '
                     f'{", ".join(WINDOWED)} for each of {layers} layers')
  return [WINDOWED[kind] for kind in kinds]


def to_hf(c):
  """config.json of a config."""
  theirs = {k: v for k, v in (llama.to_hf(c) | mixtral.common(c)).items() if k != 'mlp_bias'}
  return theirs | dict(
      architectures=['GptOssForCausalLM'], model_type='gpt_oss', hidden_act='silu',
      intermediate_size=c.moe.hidden, num_local_experts=c.moe.experts,
      attention_bias=c.attention.bias, swiglu_limit=c.moe.limit, swiglu_alpha=c.moe.alpha,
      layer_types=[list(WINDOWED)[layer.window is None] for layer in c.each])


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
