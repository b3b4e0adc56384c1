"""config.json of GPT-2, GPT-NeoX, OPT and Phi: what is read, what is refused, and back."""
import copy
import re

import pytest

from lean_jax.errors import InputError
from lean_jax.models.families import FAMILIES

# What each family's variants set beside the defaults; from_hf and to_hf are inverses on them.
VARIANTS = {
    'gpt2': [{}, dict(n_inner=100), dict(n_embd=32, n_head=2, n_positions=8, vocab_size=50),
             dict(scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True),
             dict(activation_function='relu', layer_norm_epsilon=1e-6, tie_word_embeddings=False)],
    'gpt_neox': [{}, dict(use_parallel_residual=False, attention_bias=False),
                 dict(rotary_pct=1., rotary_emb_base=500.), dict(hidden_act='gelu_new'),
                 dict(tie_word_embeddings=True, layer_norm_eps=1e-6),
                 dict(rotary_pct=.5, rope_scaling=dict(rope_type='linear', factor=2.))],
    'opt': [{}, dict(do_layer_norm_before=False, word_embed_proj_dim=512, hidden_size=1024,
                     num_attention_heads=16, ffn_dim=4096),
            dict(word_embed_proj_dim=768), dict(enable_bias=False, tie_word_embeddings=False),
            dict(_remove_final_layer_norm=True), dict(layer_norm_elementwise_affine=False),
            dict(activation_function='gelu')],
    'phi': [{}, dict(num_key_value_heads=4), dict(qk_layernorm=True, hidden_act='gelu'),
            dict(partial_rotary_factor=1., rope_theta=500.), dict(partial_rotary_factor=.25),
            dict(rope_scaling=dict(rope_type='dynamic', factor=2.), vocab_size=99)],
}
CASES = [(family, given) for family, every in VARIANTS.items() for given in every]
REFUSED = [
    ('gpt2', dict(add_cross_attention=True)),
    ('gpt2', dict(activation_function='quick_gelu')),
    ('gpt2', dict(n_head=7)),
    ('gpt2', dict(layer_norm_epsilon=-1)),
    ('gpt_neox', dict(head_dim=64)),
    ('gpt_neox', dict(hidden_act='mish')),
    ('gpt_neox', dict(num_attention_heads=7)),
    ('gpt_neox', dict(rope_scaling=dict(rope_type='mrope'))),
    ('phi', dict(tie_word_embeddings=True)),
    ('phi', dict(hidden_act='mish')),
    ('phi', dict(num_key_value_heads=5)),
    ('opt', dict(activation_function='mish')),
    ('opt', dict(num_attention_heads=7)),
    ('opt', dict(word_embed_proj_dim='wide')),
    *((family, dict([item])) for family in VARIANTS for item in dict(
        quantization_config=dict(bits=4), per_layer_config={'0': {}}, is_causal=False).items()),
]


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_a_config_survives_the_way_to_hugging_face_and_back(family, given):
  family = FAMILIES[family]
  config = family.from_hf(given)
  assert family.from_hf(family.to_hf(config)) == config
  assert config == family.from_hf({}) or given


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_absent_keys_mean_what_they_mean_to_transformers(family, given):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoConfig.for_model(family, **copy.deepcopy(given)).to_dict()
  assert FAMILIES[family].from_hf(theirs) == FAMILIES[family].from_hf(given)


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_transformers_reads_from_what_we_write_what_it_would_have_read(family, given):
  transformers = pytest.importorskip('transformers')
  written = FAMILIES[family].to_hf(FAMILIES[family].from_hf(given))
  written = {k: v for k, v in written.items() if k not in ('model_type', 'architectures')}
  ours, theirs = (transformers.AutoConfig.for_model(family, **copy.deepcopy(hf)).to_dict()
                  for hf in (written, given))
  # What follows from other keys where it is not written.
  if theirs.get('n_inner', 0) is None:
    theirs['n_inner'] = 4 * theirs['n_embd']
  if 'head_dim' in ours:
    theirs.setdefault('head_dim', theirs['hidden_size'] // theirs['num_attention_heads'])
  assert ours == theirs


@pytest.mark.parametrize(('family', 'given'), REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(family, given):
  with pytest.raises(InputError) as error:
    FAMILIES[family].from_hf(given)
  message = str(error.value)
  assert '\n' not in message
  assert all(key in message or str(value) in message for key, value in given.items()), message


# Keys that say how a model is trained, begun, run or decoded, not what it computes.
ELSEWHERE = re.compile(
    r'.*dropout|.*_pdrop|layerdrop|initializer_range|init_std'
    r'|(bos|eos|pad)_token_id|use_cache|reorder_and_upcast_attn|chunk_size_feed_forward'
    r'|summary_.*|problem_type|id2label|label2id|output_.*|return_dict|dtype'
    r'|transformers_version|_name_or_path|architectures|model_type|is_decoder|is_encoder_decoder')


@pytest.mark.parametrize('family', VARIANTS)
def test_every_key_of_a_family_is_read_refused_or_known_to_be_of_no_account(family):
  transformers = pytest.importorskip('transformers')
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

  theirs = transformers.AutoConfig.for_model(family).to_dict()
  FAMILIES[family].from_hf(Watched(theirs))
  assert not [key for key in theirs if key not in seen and not ELSEWHERE.fullmatch(key)]


def test_gpt2_is_read_by_the_general_names_too():
  from_hf = FAMILIES['gpt2'].from_hf
  assert from_hf(dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=3,
                      max_position_embeddings=8)) == from_hf(
      dict(n_embd=32, n_head=2, n_layer=3, n_positions=8))


@pytest.mark.parametrize(('family', 'buffers', 'parameters'), [
    ('gpt2', ('h.0.attn.bias', 'transformer.h.11.attn.masked_bias'),
     ('h.0.attn.c_attn.bias', 'h.0.ln_1.bias')),
    ('gpt_neox', ('gpt_neox.layers.0.attention.bias', 'layers.9.attention.masked_bias',
                  'gpt_neox.layers.0.attention.rotary_emb.inv_freq'),
     ('gpt_neox.layers.0.attention.dense.bias', 'embed_out.weight')),
])
def test_buffers_of_old_checkpoints_are_no_parameters(family, buffers, parameters):
  ignored = FAMILIES[family].ignored
  assert all(re.fullmatch(ignored, name) for name in buffers)
  assert not any(re.fullmatch(ignored, name) for name in parameters)
