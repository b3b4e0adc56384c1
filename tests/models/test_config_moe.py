"""config.json of mixtures of experts: what is read, what is refused, and back."""
import dataclasses
import re

import pytest

from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.families import FAMILIES

YARN = dict(rope_type='yarn', rope_theta=1e4, factor=4., original_max_position_embeddings=4096)
# What each family's variants set beside the defaults; from_hf and to_hf are inverses on them.
VARIANTS = {
    'mixtral': [{}, dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, head_dim=32),
                dict(num_local_experts=4, num_experts_per_tok=1, sliding_window=4096),
                dict(hidden_act='gelu', tie_word_embeddings=True, output_router_logits=True,
                     router_aux_loss_coef=.02), dict(rope_parameters=YARN)],
    'qwen3_moe': [{}, dict(norm_topk_prob=True, head_dim=64, num_experts=16, num_experts_per_tok=4),
                  dict(mlp_only_layers=[0, 3], moe_intermediate_size=100, intermediate_size=200),
                  dict(use_sliding_window=True, sliding_window=100, attention_bias=True),
                  dict(output_router_logits=True, rope_parameters=YARN, rms_norm_eps=1e-5)],
    'deepseek_v3': [{}, dict(q_lora_rank=None, attention_bias=True, rope_interleave=False),
                    dict(n_group=1, topk_group=1, n_shared_experts=3, norm_topk_prob=False),
                    dict(first_k_dense_replace=0, routed_scaling_factor=1., num_hidden_layers=2),
                    dict(rope_parameters=YARN | dict(mscale=.7, mscale_all_dim=1.),
                         max_position_embeddings=16384),
                    dict(qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, kv_lora_rank=64,
                         num_attention_heads=8, num_key_value_heads=8)],
    'gpt_oss': [{}, dict(num_local_experts=32, num_hidden_layers=24, attention_bias=False),
                dict(num_hidden_layers=2, layer_types=['full_attention', 'sliding_attention']),
                dict(swiglu_limit=5., swiglu_alpha=1.5, output_router_logits=True),
                dict(rope_parameters=dict(rope_type='default', rope_theta=1e4), sliding_window=64)],
}
CASES = [(family, given) for family, every in VARIANTS.items() for given in every]
REFUSED = [
    ('mixtral', dict(num_experts_per_tok=9)),
    ('mixtral', dict(num_local_experts=0)),
    ('mixtral', dict(router_jitter_noise=.1)),
    ('mixtral', dict(attention_bias=True)),
    ('mixtral', dict(hidden_act='mish')),
    ('qwen3_moe', dict(mlp_only_layers='all')),
    ('qwen3_moe', dict(mlp_only_layers=list(range(24)))),
    ('qwen3_moe', dict(decoder_sparse_step=0)),
    ('qwen3_moe', dict(num_experts_per_tok=129)),
    ('qwen3_moe', dict(rope_parameters=dict(rope_type='spiral'))),
    ('deepseek_v3', dict(num_key_value_heads=8)),
    ('deepseek_v3', dict(n_group=7)),
    ('deepseek_v3', dict(topk_group=9)),
    ('deepseek_v3', dict(n_group=256)),
    ('deepseek_v3', dict(first_k_dense_replace=61)),
    ('deepseek_v3', dict(first_k_dense_replace='three')),
    ('deepseek_v3', dict(scoring_func='softmax')),
    ('deepseek_v3', dict(topk_method='greedy')),
    ('deepseek_v3', dict(moe_layer_freq=2)),
    ('gpt_oss', dict(hidden_act='gelu')),
    ('gpt_oss', dict(swiglu_limit=0)),
    ('gpt_oss', dict(layer_types=['full_attention'])),
    ('gpt_oss', dict(layer_types=['chunked_attention'] * 36)),
    *((family, dict([item])) for family in VARIANTS for item in dict(
        quantization_config=dict(bits=4), per_layer_config={'0': {}}, mlp_bias=True).items()),
]


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_a_config_survives_the_way_to_hugging_face_and_back(family, given):
  family = FAMILIES[family]
  config = family.from_hf(given)
  assert family.from_hf(family.to_hf(config)) == config
  assert config == family.from_hf({}) or given
  longer = dataclasses.replace(config, context=1234567)
  assert family.from_hf(family.to_hf(longer)) == longer


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_absent_keys_mean_what_they_mean_to_transformers(family, given):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoConfig.for_model(family, **given).to_dict()
  assert FAMILIES[family].from_hf(theirs) == FAMILIES[family].from_hf(given)


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_transformers_reads_from_what_we_write_what_it_would_have_read(family, given):
  transformers = pytest.importorskip('transformers')
  written = FAMILIES[family].to_hf(FAMILIES[family].from_hf(given))
  written = {k: v for k, v in written.items() if k not in ('model_type', 'architectures')}
  ours, theirs = (transformers.AutoConfig.for_model(family, **hf).to_dict()
                  for hf in (written, given))
  # What is added says what transformers computes without it.
  ours['rope_parameters'] = {k: v for k, v in ours['rope_parameters'].items()
                             if k in theirs['rope_parameters']}
  differ = {k: (ours.get(k), theirs.get(k)) for k in ours | theirs if ours.get(k) != theirs.get(k)}
  if differ.get('head_dim', ())[1:] == (None,):
    differ.pop('head_dim')
  assert not differ


@pytest.mark.parametrize(('family', 'given'), REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(family, given):
  with pytest.raises(InputError) as error:
    FAMILIES[family].from_hf(given)
  message = str(error.value)
  assert '\n' not in message
  assert all(key in message or str(value) in message for key, value in given.items()), message


# Keys that say how a model is trained, begun, run or decoded, not what it computes.
ELSEWHERE = re.compile(
    r'.*dropout|initializer_range|(bos|eos|pad)_token_id|use_cache|chunk_size_feed_forward'
    r'|problem_type|id2label|label2id|output_(attentions|hidden_states)|return_dict|dtype'
    r'|transformers_version|_name_or_path|architectures|model_type|is_encoder_decoder'
    r'|pretraining_tp|num_nextn_predict_layers')


@pytest.mark.parametrize('family', VARIANTS)
def test_every_key_of_a_family_is_read_or_known_to_be_of_no_account(family):
  transformers = pytest.importorskip('transformers')
  # With the loss of a router asked for, and a window: else what says them says nothing.
  asked = dict(output_router_logits=True, use_sliding_window=True, sliding_window=64)
  theirs = {k: asked.get(k, v)
            for k, v in transformers.AutoConfig.for_model(family).to_dict().items()}
  config = FAMILIES[family].from_hf(theirs)
  unread = []
  for key, value in theirs.items():
    other = not value if isinstance(value, bool) else 'odd'
    try:
      if FAMILIES[family].from_hf(theirs | {key: other}) == config:
        unread.append(key)
    except InputError:
      pass
  # Widths that others say; DeepSeek's routers have no such loss.
  known = {'head_dim', 'qk_head_dim', 'output_router_logits'} if family == 'deepseek_v3' else set()
  assert not [key for key in unread if key not in known and not ELSEWHERE.fullmatch(key)]


def test_dense_layers_stand_where_config_json_says():
  kinds = lambda family, **kw: [layer.feed_forward for layer in FAMILIES[family].from_hf(kw).each]
  assert kinds('deepseek_v3', num_hidden_layers=4) == ['mlp'] * 3 + ['moe']
  assert kinds('qwen3_moe', num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]) == [
      'mlp', 'moe', 'mlp', 'mlp', 'mlp', 'moe']


def test_every_other_layer_of_gpt_oss_has_a_window():
  layers = FAMILIES['gpt_oss'].from_hf(dict(num_hidden_layers=3)).each
  assert layers == (Layer(feed_forward='moe', window=128), Layer(feed_forward='moe'),
                    Layer(feed_forward='moe', window=128))


def test_the_released_spelling_of_deepseek_is_read():
  scaling = dict(beta_fast=32, beta_slow=1, factor=40, mscale=1., mscale_all_dim=1.,
                 original_max_position_embeddings=4096, type='yarn')
  c = FAMILIES['deepseek_v3'].from_hf(dict(
      max_position_embeddings=163840, rope_scaling=scaling, rope_theta=10000, moe_layer_freq=1,
      scoring_func='sigmoid', topk_method='noaux_tc', num_nextn_predict_layers=1, ep_size=1))
  assert c.context == 163840
  # 1 / sqrt(192), times (1 + ln(40) / 10) ** 2 (arXiv:2309.00071, equation 22)
  assert c.latent.scale == pytest.approx(192 ** -.5 * 1.3688879 ** 2, rel=1e-6)
  assert c.attention.ropes[0].scaling.amplitude == 1
