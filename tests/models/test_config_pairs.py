"""config.json of T5 and BART: what is read, what is refused, and back."""
import dataclasses
import re

import pytest

from lean_jax.errors import InputError
from lean_jax.interop.hf import configured
from lean_jax.models.families import FAMILIES

# What each family's variants set beside the defaults; from_hf and to_hf are inverses on them.
VARIANTS = {
    't5': [{}, dict(d_model=32, d_kv=10, num_heads=3, num_layers=2, num_decoder_layers=5),
           dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
           dict(feed_forward_proj='gelu'), dict(feed_forward_proj='gated-silu', d_ff=7),
           dict(relative_attention_num_buckets=8, relative_attention_max_distance=20),
           dict(decoder_start_token_id=3, layer_norm_epsilon=1e-5, vocab_size=50)],
    'bart': [{}, dict(d_model=32, encoder_attention_heads=4, decoder_attention_heads=2),
             dict(encoder_layers=2, decoder_layers=3, encoder_ffn_dim=8, decoder_ffn_dim=9),
             dict(scale_embedding=True, activation_function='relu'),
             dict(decoder_start_token_id=0, forced_eos_token_id=None),
             dict(max_position_embeddings=8, vocab_size=50)],
}
CASES = [(family, given) for family, every in VARIANTS.items() for given in every]
REFUSED = [
    ('t5', dict(feed_forward_proj='gated-mish')),
    ('t5', dict(feed_forward_proj='gated-gelu-new')),
    ('t5', dict(relative_attention_num_buckets=7)),
    ('t5', dict(relative_attention_max_distance=16)),
    ('t5', dict(decoder_start_token_id=99_999)),
    ('t5', dict(num_heads=0)),
    ('bart', dict(activation_function='quick_gelu')),
    ('bart', dict(encoder_attention_heads=7)),
    ('bart', dict(tie_word_embeddings=False)),
    ('bart', dict(normalize_before=True)),
    ('bart', dict(normalize_embedding=False)),
    ('bart', dict(add_final_layer_norm=True)),
    ('bart', dict(static_position_embeddings=True)),
    ('bart', dict(add_bias_logits=True)),
    ('bart', dict(forced_bos_token_id=[1, 2])),
    *((family, dict([item])) for family in VARIANTS for item in dict(
        quantization_config=dict(bits=4), is_encoder_decoder=False, is_decoder=True).items()),
]

# Keys that say how a model is trained, begun, run or decoded, not what it computes.
ELSEWHERE = re.compile(
    r'.*dropout(_rate)?|.*layerdrop|initializer_factor|init_std|(bos|eos|pad)_token_id|use_cache'
    r'|chunk_size_feed_forward|problem_type|id2label|label2id|output_.*|return_dict|dtype'
    r'|transformers_version|_name_or_path|architectures|model_type')


class Seen(dict):
  """A config.json that notes which of its keys are read."""

  def __init__(self, items, keys_read=None):
    super().__init__(items)
    self.keys_read = set() if keys_read is None else keys_read

  def __or__(self, other):
    return Seen({**self, **other}, self.keys_read)

  def __ror__(self, other):
    return Seen({**other, **self}, self.keys_read)

  def __getitem__(self, key):
    self.keys_read.add(key)
    return super().__getitem__(key)

  def __contains__(self, key):
    self.keys_read.add(key)
    return super().__contains__(key)

  def get(self, key, default=None):
    self.keys_read.add(key)
    return super().get(key, default)


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_a_config_survives_the_way_to_hugging_face_and_back(family, given):
  family = FAMILIES[family]
  config = family.from_hf(given)
  assert family.from_hf(family.to_hf(config)) == config
  assert config == family.from_hf({}) or given


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_absent_keys_mean_what_they_mean_to_transformers(family, given):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoConfig.for_model(family, **given).to_dict()
  ours = FAMILIES[family].from_hf(given)
  # transformers ties T5's head, whatever the config says, if the checkpoint has none of its own.
  if given.get('tie_word_embeddings') is False:
    ours = configured(ours, tied=True)
  assert FAMILIES[family].from_hf(theirs) == ours


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_transformers_reads_from_what_we_write_what_it_would_have_read(family, given):
  transformers = pytest.importorskip('transformers')
  written = FAMILIES[family].to_hf(FAMILIES[family].from_hf(given))
  written = {k: v for k, v in written.items() if k not in ('model_type', 'architectures')}
  ours, theirs = (transformers.AutoConfig.for_model(family, **hf).to_dict()
                  for hf in (written, given))
  assert not {k: (ours.get(k), v) for k, v in theirs.items() if ours.get(k) != v}


@pytest.mark.parametrize(('family', 'given'), REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(family, given):
  with pytest.raises(InputError) as error:
    FAMILIES[family].from_hf(given)
  message = str(error.value)
  assert '\n' not in message
  assert all(key in message or str(value) in message for key, value in given.items()), message


def test_settings_reach_both_stacks():
  config = configured(FAMILIES['t5'].from_hf({}), dtype='bfloat16', remat=True)
  for stack in config.stacks.values():
    assert (stack.dtype, stack.remat) == ('bfloat16', True)
  assert dataclasses.replace(config, start=3).dtype == 'bfloat16'


@pytest.mark.parametrize('family', VARIANTS)
def test_every_key_of_a_family_is_read_refused_or_known_to_be_of_no_account(family):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoConfig.for_model(family).to_dict()
  seen = Seen(theirs)
  FAMILIES[family].from_hf(seen)
  assert not [key for key in theirs if key not in seen.keys_read and not ELSEWHERE.fullmatch(key)]
