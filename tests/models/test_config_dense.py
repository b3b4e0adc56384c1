"""config.json of families like Llama: what is read, what is refused, and back."""
import re

import pytest

from lean_jax.errors import InputError
from lean_jax.models.families import FAMILIES

FULL, SLIDING = 'full_attention', 'sliding_attention'
SHORT, LONG = [1.5] * 48, [4.] * 48
LONGROPE = dict(type='longrope', short_factor=SHORT, long_factor=LONG)
LLAMA3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4.,
              original_max_position_embeddings=1024)
LINEAR = dict(rope_type='linear', factor=8.)

# What each family's variants set beside the defaults; from_hf and to_hf are inverses on them.
VARIANTS = {
    'llama': [{}, dict(num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
              dict(attention_bias=True, mlp_bias=True, hidden_act='gelu', rms_norm_eps=1e-5),
              dict(rope_theta=5e5, rope_scaling=LLAMA3)],
    'mistral': [{}, dict(sliding_window=None, head_dim=64, num_key_value_heads=4)],
    'qwen2': [{}, dict(use_sliding_window=True, sliding_window=99), dict(num_key_value_heads=2),
              dict(use_sliding_window=True, num_hidden_layers=2, layer_types=[SLIDING, FULL])],
    'qwen3': [{}, dict(head_dim=64, attention_bias=True),
              dict(use_sliding_window=True, sliding_window=99, max_window_layers=30)],
    'gemma': [{}, dict(hidden_act='relu', num_key_value_heads=1, attention_bias=True),
              dict(head_dim=128, tie_word_embeddings=False)],
    'gemma2': [{}, dict(query_pre_attn_scalar=144, sliding_window=99, attention_bias=True),
               dict(attn_logit_softcapping=None, final_logit_softcapping=None),
               dict(num_hidden_layers=2, layer_types=[FULL, SLIDING], hidden_activation='silu')],
    'gemma3_text': [{}, dict(query_pre_attn_scalar=168, final_logit_softcapping=3.),
                    dict(rope_scaling=LINEAR, rope_parameters={FULL: LINEAR, SLIDING: {}}),
                    dict(num_hidden_layers=2, layer_types=[FULL, SLIDING])],
    'phi3': [{}, dict(sliding_window=2047), dict(num_key_value_heads=8, tie_word_embeddings=True),
             dict(max_position_embeddings=131072, rope_scaling=LONGROPE),
             dict(partial_rotary_factor=.5)],
    'olmo2': [{}, dict(num_key_value_heads=8, attention_bias=True, rope_theta=5e5)],
}
CASES = [(family, given) for family, every in VARIANTS.items() for given in every]
REFUSED = [
    *(('llama', dict([item])) for item in dict(
        hidden_act='mish', sliding_window=128, partial_rotary_factor=.5, num_key_value_heads=5,
        rope_scaling=dict(type='spiral')).items()),
    ('mistral', dict(attention_bias=True)),
    ('mistral', dict(num_hidden_layers=2, layer_types=[SLIDING, FULL])),
    ('qwen2', dict(attention_bias=False)),
    ('qwen2', dict(use_mrope=True)),
    ('qwen2', dict(num_hidden_layers=2, layer_types=[SLIDING])),
    ('qwen2', dict(num_hidden_layers=1, layer_types=['linear_attention'])),
    ('qwen3', dict(mlp_bias=True)),
    ('gemma', dict(hidden_activation='silu')),
    ('gemma2', dict(use_bidirectional_attention=True)),
    ('gemma2', dict(query_pre_attn_scalar=0)),
    ('gemma3_text', dict(attn_logit_softcapping=30.)),
    ('gemma3_text', dict(use_bidirectional_attention=True)),
    ('phi3', dict(rope_scaling=LONGROPE | dict(short_factor=[1.]))),
    ('phi3', dict(partial_rotary_factor=.01)),
    ('phi3', dict(lm_head_bias=True)),
    ('olmo2', dict(clip_qkv=8.)),
    *((family, dict([item])) for family in VARIANTS for item in dict(
        quantization_config=dict(bits=4), per_layer_config={'0': {}}, is_causal=False,
        rope_parameters=dict(mrope_section=[1])).items()),
]


def id_of(value):
  return value if isinstance(value, str) else ', '.join(value) or 'defaults'


@pytest.mark.parametrize(('family', 'given'), CASES, ids=id_of)
def test_a_config_survives_the_way_to_hugging_face_and_back(family, given):
  family = FAMILIES[family]
  config = family.from_hf(given)
  assert family.from_hf(family.to_hf(config)) == config
  assert config == family.from_hf({}) or given


def read_by_transformers(family, hf):
  """What transformers makes of a config.json."""
  transformers = pytest.importorskip('transformers')
  hf = {k: v for k, v in hf.items() if k not in ('model_type', 'architectures')}
  return transformers.AutoConfig.for_model(family, **hf).to_dict()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('family', 'given'), CASES, ids=id_of)
def test_absent_keys_mean_what_they_mean_to_transformers(family, given):
  from_hf = FAMILIES[family].from_hf
  assert from_hf(read_by_transformers(family, given)) == from_hf(given)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('family', 'given'), CASES, ids=id_of)
def test_transformers_reads_from_what_we_write_what_it_would_have_read(family, given):
  written = FAMILIES[family].to_hf(FAMILIES[family].from_hf(given))
  ours, theirs = (read_by_transformers(family, hf) for hf in (written, given))
  theirs.setdefault('head_dim', theirs['hidden_size'] // theirs['num_attention_heads'])
  for hf in (ours, theirs):
    hf.pop('max_window_layers', None)                  # layer_types say more
  assert ours == theirs


@pytest.mark.parametrize(('family', 'given'), REFUSED, ids=id_of)
def test_what_is_not_computed_is_refused_by_its_name(family, given):
  with pytest.raises(InputError) as error:
    FAMILIES[family].from_hf(given)
  message = str(error.value)
  assert '\n' not in message
  key = list(given)[-1]
  assert key in message or str(given[key]) in message, message


# Keys that say how a model is trained, begun, run or decoded, not what it computes; and those of
# which layer_types is made, which transformers writes always.
ELSEWHERE = re.compile(
    r'.*dropout|.*_pdrop|initializer_range|(bos|eos|pad)_token_id|use_cache|pretraining_tp'
    r'|chunk_size_feed_forward|problem_type|id2label|label2id|output_.*|return_dict|dtype'
    r'|transformers_version|_name_or_path|architectures|model_type|is_encoder_decoder'
    r'|max_window_layers|_sliding_window_pattern')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', VARIANTS)
def test_every_key_of_a_family_is_read_refused_or_known_to_be_of_no_account(family):
  seen = set()

  class Watched(dict):
    def __or__(self, other):
      return Watched({**self, **other})

    def __ror__(self, other):
      return Watched({**other, **self})

    def __getitem__(self, key):
      seen.add(key)
      return super().__getitem__(key)

    def get(self, key, default=None):
      seen.add(key)
      return super().get(key, default)

  theirs = read_by_transformers(family, {})
  FAMILIES[family].from_hf(Watched(theirs))
  assert not [key for key in theirs if key not in seen and not ELSEWHERE.fullmatch(key)]
