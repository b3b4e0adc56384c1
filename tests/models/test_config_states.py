"""config.json of Mamba, Mamba-2 and Jamba: what is read, what is refused, and back."""
import dataclasses
import math
import re

import pytest

from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.families import FAMILIES

# What each family's variants set beside the defaults; from_hf and to_hf are inverses on them.
VARIANTS = {
    'mamba': [{}, dict(hidden_size=100, num_hidden_layers=2, state_size=4, vocab_size=50),
              dict(expand=3, time_step_rank=7, conv_kernel=2, hidden_act='gelu'),
              dict(intermediate_size=1000, use_bias=True, use_conv_bias=False,
                   tie_word_embeddings=False, layer_norm_epsilon=1e-6)],
    'mamba2': [{}, dict(hidden_size=32, num_heads=4, head_dim=16, n_groups=2, num_hidden_layers=1),
               dict(time_step_limit=(.001, .2), chunk_size=64, state_size=16),
               dict(time_step_limit=(0., .2), use_bias=True, tie_word_embeddings=True,
                    n_groups=1)],
    'jamba': [{}, dict(num_experts=1), dict(attn_layer_period=4, attn_layer_offset=0),
              dict(expert_layer_period=1, expert_layer_offset=0, num_experts_per_tok=1,
                   num_hidden_layers=16),
              dict(mamba_expand=1, mamba_d_state=4, mamba_d_conv=2, mamba_dt_rank=5,
                   mamba_proj_bias=True, mamba_conv_bias=False),
              dict(hidden_act='gelu', tie_word_embeddings=True, num_key_value_heads=4,
                   output_router_logits=True, router_aux_loss_coef=.01)],
}
CASES = [(family, given) for family, every in VARIANTS.items() for given in every]
REFUSED = [
    ('mamba', dict(hidden_act='mish')),
    ('mamba', dict(state_size=0)),
    ('mamba', dict(rms_norm=False)),
    ('mamba', dict(time_step_rank='high')),
    ('mamba2', dict(head_dim=63)),
    ('mamba2', dict(n_groups=7)),
    ('mamba2', dict(time_step_limit=(.2, .1))),
    ('mamba2', dict(time_step_limit=.1)),
    ('mamba2', dict(rms_norm=False)),
    ('jamba', dict(attn_layer_offset=9)),
    ('jamba', dict(expert_layer_period=0)),
    ('jamba', dict(sliding_window=100)),
    ('jamba', dict(mamba_inner_layernorms=False)),
    ('jamba', dict(num_experts_per_tok=17)),
    *((family, dict([item])) for family in VARIANTS for item in dict(
        quantization_config=dict(bits=4), per_layer_config={'0': {}}).items()),
]


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_a_config_survives_the_way_to_hugging_face_and_back(family, given):
  family = FAMILIES[family]
  config = family.from_hf(given)
  assert family.from_hf(family.to_hf(config)) == config
  assert config == family.from_hf({}) or given
  longer = dataclasses.replace(config, context=12345)
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
  differ = {k for k in ours | theirs if ours.get(k) != theirs.get(k)}
  if given.get('num_experts') == 1:
    differ -= {'expert_layer_period', 'expert_layer_offset'}               # of no layer
  if 'intermediate_size' in given:
    differ -= {'expand'}                                                   # which then says nothing
  assert not {k for k in differ if list(ours.get(k, ())) != list(theirs.get(k, ()))}


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
    r'|problem_type|id2label|label2id|output_.*|return_dict|dtype|transformers_version'
    r'|_name_or_path|architectures|model_type|is_encoder_decoder|residual_in_fp32'
    r'|time_step_(scale|min|max|floor|init_scheme)|rescale_prenorm_residual|use_mambapy'
    r'|use_mamba_kernels|use_associative_scan')


@pytest.mark.parametrize('family', VARIANTS)
def test_every_key_of_a_family_is_read_or_known_to_be_of_no_account(family):
  transformers = pytest.importorskip('transformers')
  # With the loss of a router asked for: else its coefficient says nothing.
  theirs = transformers.AutoConfig.for_model(family).to_dict() | dict(output_router_logits=True)
  config = FAMILIES[family].from_hf(theirs)
  unread = []
  for key, value in theirs.items():
    other = not value if isinstance(value, bool) else 'odd'
    try:
      if FAMILIES[family].from_hf(theirs | {key: other}) == config:
        unread.append(key)
    except (InputError, TypeError, ValueError):
      pass
  # transformers too reads no rank of Mamba-2.
  known = {'time_step_rank'} if family == 'mamba2' else set()
  assert not [key for key in unread if key not in known and not ELSEWHERE.fullmatch(key)]


@pytest.mark.parametrize('value', [[0., math.inf], [0., dict(__float__='Infinity')], (0, math.inf)])
def test_no_greatest_time_step_has_several_spellings(value):
  from_hf = FAMILIES['mamba2'].from_hf
  assert from_hf(dict(time_step_limit=value)) == from_hf({})


def test_an_order_of_layers_that_has_no_period_is_not_written():
  family = FAMILIES['jamba']
  config = family.from_hf(dict(num_hidden_layers=4))
  kinds = tuple(Layer(mixer=m) for m in ('attention', 'mamba', 'attention', 'attention'))
  with pytest.raises(InputError, match=r'layers \[0, 2, 3\] of 4'):
    family.to_hf(dataclasses.replace(config, kinds=kinds))


def test_half_of_a_jamba_can_be_saved():
  family = FAMILIES['jamba']
  config = family.from_hf({})
  half = dataclasses.replace(config, layers=16, kinds=config.kinds[::2])
  assert family.from_hf(family.to_hf(half)) == half
