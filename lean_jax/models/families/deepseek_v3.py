"""DeepSeek-V3 (arXiv:2412.19437): latent attention, shared experts, a router balanced by a bias."""
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import llama, mixtral
from lean_jax.models.families.base import (
  ACTIVATIONS,
  Family,
  Stored,
  activation_name,
  chosen,
  given,
  linear,
  parts,
  positive,
  require,
  rope_theta,
)
from lean_jax.models.stack import Layer
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.latent import LatentOptions
from lean_jax.nn.mlp import MLPOptions
from lean_jax.nn.moe import MoEOptions
from lean_jax.nn.rope import Rope
from lean_jax.nn.router import RouterOptions

DEFAULTS = dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_attention_heads=128, n_shared_experts=1, n_routed_experts=256,
    routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64,
    v_head_dim=128, qk_nope_head_dim=128, n_group=8, topk_group=4, num_experts_per_tok=8,
    first_k_dense_replace=3, norm_topk_prob=True, hidden_act='silu', max_position_embeddings=4096,
    rms_norm_eps=1e-6, tie_word_embeddings=False, rope_interleave=True, attention_bias=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  # The last three are read by DeepSeek's own code alone.
  require(hf, dict(num_key_value_heads=(None, hf.get('num_attention_heads', 128)),
                   scoring_func=('sigmoid',), topk_method=('noaux_tc',), moe_layer_freq=(1,)))
  hf = DEFAULTS | hf
  layers, heads = positive(hf, 'num_hidden_layers'), positive(hf, 'num_attention_heads')
  activation, dense = chosen(hf, 'hidden_act', ACTIVATIONS), hf['first_k_dense_replace'] or 0
  rope = Rope(theta=rope_theta(hf), interleaved=bool(hf['rope_interleave']))
  return DecoderConfig(
      width=positive(hf, 'hidden_size'), heads=heads, groups=heads,
      head_width=positive(hf, 'qk_rope_head_dim'), vocabulary=positive(hf, 'vocab_size'),
      layers=layers, hidden=positive(hf, 'intermediate_size'),
      context=positive(hf, 'max_position_embeddings'),
      kinds=tuple(Layer('latent', 'mlp' if k < dense else 'moe') for k in range(layers)),
      attention=AttentionOptions(ropes=(rope,)), latent=latent(hf),
      mlp=MLPOptions(activation=activation), moe=experts(hf, activation),
      epsilon=positive(hf, 'rms_norm_eps', float), tied=bool(hf['tie_word_embeddings']))


def latent(hf):
  """The options of latent attention in config.json."""
  return LatentOptions(
      query_rank=given(hf, 'q_lora_rank', None), rank=positive(hf, 'kv_lora_rank'),
      plain_width=positive(hf, 'qk_nope_head_dim'), rope_width=positive(hf, 'qk_rope_head_dim'),
      value_width=positive(hf, 'v_head_dim'), bias=bool(hf['attention_bias']))


def experts(hf, activation):
  """The options of the experts in config.json.

  Raises:
    InputError: its groups of experts do not go together.
  """
  count, hidden = positive(hf, 'n_routed_experts'), positive(hf, 'moe_intermediate_size')
  groups, best, k = given(hf, 'n_group', 1), given(hf, 'topk_group', 1), mixtral.top_k(hf, count)
  if count % groups or count < 2 * groups or not best <= groups or k > best * (count // groups):
    raise InputError(f'config.json has {count} experts in n_group = {groups} groups, of which a '
                     f'token uses {k} from topk_group = {best}; groups are alike and of at least '
                     'two experts')
  return MoEOptions(
      experts=count, hidden=hidden, activation=activation,
      shared_hidden=hidden * positive(hf, 'n_shared_experts'),
      router=RouterOptions(
          top_k=k, scores='sigmoid', correction=True, normalise=bool(hf['norm_topk_prob']),
          scale=positive(hf, 'routed_scaling_factor', float), groups=groups, top_groups=best))


def to_hf(c):
  """config.json of a config."""
  o, r = c.latent, c.moe.router
  return dict(
      architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3', vocab_size=c.vocabulary,
      hidden_size=c.width, intermediate_size=c.hidden, moe_intermediate_size=c.moe.hidden,
      num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.heads,
      n_shared_experts=c.moe.shared_hidden // c.moe.hidden, n_routed_experts=c.moe.experts,
      routed_scaling_factor=r.scale, kv_lora_rank=o.rank, q_lora_rank=o.query_rank,
      qk_rope_head_dim=o.rope_width, v_head_dim=o.value_width, qk_nope_head_dim=o.plain_width,
      n_group=r.groups, topk_group=r.top_groups, num_experts_per_tok=r.top_k,
      first_k_dense_replace=sum(layer.feed_forward == 'mlp' for layer in c.each),
      norm_topk_prob=r.normalise, hidden_act=activation_name(c.moe.activation),
      max_position_embeddings=c.context, rms_norm_eps=c.epsilon, tie_word_embeddings=c.tied,
      rope_theta=c.attention.ropes[0].theta, rope_interleave=c.attention.ropes[0].interleaved,
      attention_bias=o.bias)


def names(c):
  """Where a checkpoint has each array."""
  layer, out = 'model.layers.{layer}.', llama.names(c)
  attention, mlp, o = f'{layer}self_attn.', f'{layer}mlp.', c.latent
  out['layers/latent/k_b/kernel'], out['layers/latent/v_b/kernel'] = parts(
      f'{attention}kv_b_proj.weight', (o.plain_width, o.value_width), repeats=c.heads)
  for ours, theirs in dict(q='q_proj', q_a='q_a_proj', q_b='q_b_proj', kv_a='kv_a_proj_with_mqa',
                           o='o_proj').items():
    out[f'layers/latent/{ours}/kernel'] = linear(f'{attention}{theirs}.weight')
    out[f'layers/latent/{ours}/bias'] = Stored(f'{attention}{theirs}.bias')
  for ours in ('q_a', 'kv_a'):
    out[f'layers/latent/{ours}_norm/scale'] = Stored(f'{attention}{ours}_layernorm.weight')
  for part in ('gate', 'up', 'down'):
    out[f'layers/moe/shared/{part}/kernel'] = linear(f'{mlp}shared_experts.{part}_proj.weight')
  return out | mixtral.expert_names(
      f'{mlp}experts.', gate='gate_proj', up='up_proj', down='down_proj') | {
          'layers/moe/router/kernel': linear(f'{mlp}gate.weight'),
          'layers/moe/router/correction': Stored(f'{mlp}gate.e_score_correction_bias')}


# Beyond the last layer a released checkpoint has one that predicts another token; none uses it.
DEEPSEEK_V3 = Family('deepseek_v3', from_hf, to_hf, names, prefix='model.',
                     ignored=r'.*\.rotary_emb\.inv_freq|model\.layers\.61\..*')
