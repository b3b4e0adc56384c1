"""DeepSeek-V3 (arXiv:2412.19437): latent attention, shared experts, a router balanced by a bias."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.families import llama, mixtral
from lean_jax.models.families.base import Family, Stored, given, linear, parts, positive, require
from lean_jax.nn.latent import LatentOptions
from lean_jax.nn.rope_scaling import Yarn, yarn_scale

DEFAULTS = dict(
    vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
    num_hidden_layers=61, num_attention_heads=128, n_shared_experts=1, n_routed_experts=256,
    routed_scaling_factor=2.5, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64,
    v_head_dim=128, qk_nope_head_dim=128, n_group=8, topk_group=4, num_experts_per_tok=8,
    first_k_dense_replace=3, norm_topk_prob=True, hidden_act='silu', max_position_embeddings=4096,
    rms_norm_eps=1e-6, tie_word_embeddings=False, rope_interleave=True, attention_bias=False)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  heads = hf.get('num_attention_heads', DEFAULTS['num_attention_heads'])
  # The last three are read by DeepSeek's own code alone.
  require(hf, dict(num_key_value_heads=(None, heads), mlp_bias=(False, None),
                   scoring_func=('sigmoid',), topk_method=('noaux_tc',), moe_layer_freq=(1,)))
  hf = DEFAULTS | hf
  # To transformers a head is what positions turn of it.
  c = llama.shared({**hf, 'num_key_value_heads': heads, 'head_dim': hf['qk_rope_head_dim']},
                   interleaved=bool(hf['rope_interleave']))
  dense = hf['first_k_dense_replace'] or 0
  if not isinstance(dense, int) or not 0 <= dense < c.layers:
    raise InputError(f'config.json has first_k_dense_replace = {dense!r}, expected a number of '
                     f'layers below {c.layers}, so that one has experts')
  return dataclasses.replace(
      c, latent=latent(hf, c.attention.ropes[0]), moe=experts(hf),
      kinds=tuple(Layer('latent', 'mlp' if k < dense else 'moe') for k in range(c.layers)))


def latent(hf, rope):
  """The options of latent attention in config.json. YaRN scales the scores here."""
  plain, turned = positive(hf, 'qk_nope_head_dim'), positive(hf, 'qk_rope_head_dim')
  scale = None
  if isinstance(rope.scaling, Yarn) and rope.scaling.mscale_all:
    grown = yarn_scale(rope.scaling.factor, rope.scaling.mscale_all)
    scale = (plain + turned) ** -.5 * grown * grown
  return LatentOptions(
      query_rank=given(hf, 'q_lora_rank', None), rank=positive(hf, 'kv_lora_rank'),
      plain_width=plain, rope_width=turned, value_width=positive(hf, 'v_head_dim'), scale=scale,
      bias=bool(hf['attention_bias']))


def experts(hf):
  """The options of the experts in config.json.

  Raises:
    InputError: its groups of experts do not go together.
  """
  groups, best = given(hf, 'n_group', 1), given(hf, 'topk_group', 1)
  moe = mixtral.experts(
      {**hf, 'output_router_logits': False}, 'n_routed_experts', 'moe_intermediate_size',
      scores='sigmoid', correction=True, normalise=bool(hf['norm_topk_prob']),
      scale=positive(hf, 'routed_scaling_factor', float), groups=groups, top_groups=best)
  each, odd = divmod(moe.experts, groups)
  if odd or each < 2 or best > groups or moe.router.top_k > best * each:
    raise InputError(f'config.json has {moe.experts} experts in n_group = {groups} groups, of '
                     f'which a token uses {moe.router.top_k} from topk_group = {best}; groups are '
                     'alike and of at least two experts')
  return dataclasses.replace(moe, shared_hidden=moe.hidden * positive(hf, 'n_shared_experts'))


def to_hf(c):
  """config.json of a config."""
  o, r = c.latent, c.moe.router
  theirs = llama.shared_hf(c, 'deepseek_v3', 'DeepseekV3ForCausalLM')
  theirs.pop('head_dim')
  return theirs | dict(
      moe_intermediate_size=c.moe.hidden, n_shared_experts=c.moe.shared_hidden // c.moe.hidden,
      n_routed_experts=c.moe.experts, routed_scaling_factor=r.scale, kv_lora_rank=o.rank,
      q_lora_rank=o.query_rank, qk_rope_head_dim=o.rope_width, v_head_dim=o.value_width,
      qk_nope_head_dim=o.plain_width, n_group=r.groups, topk_group=r.top_groups,
      num_experts_per_tok=r.top_k, norm_topk_prob=r.normalise, attention_bias=o.bias,
      first_k_dense_replace=sum(layer.feed_forward == 'mlp' for layer in c.each),
      rope_interleave=c.attention.ropes[0].interleaved)


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
          # Large, its differences small: in bfloat16 other experts would be chosen.
          'layers/moe/router/correction': Stored(f'{mlp}gate.e_score_correction_bias',
                                                 dtype='float32')}


# Beyond the last layer a released checkpoint has one that predicts another token; none uses it.
DEEPSEEK_V3 = Family('deepseek_v3', from_hf, to_hf, names, prefix='model.',
                     ignored=r'.*\.rotary_emb\.inv_freq|model\.layers\.61\..*')
