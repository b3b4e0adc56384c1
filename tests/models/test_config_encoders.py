"""config.json of BERT, RoBERTa, DistilBERT and ModernBERT: what is read, what is refused, back."""
import dataclasses
import re

import pytest

from lean_jax.errors import InputError
from lean_jax.models.families import FAMILIES
from tests.models.test_config_pairs import Seen

NAMES = dict(bert='Bert', roberta='Roberta', distilbert='DistilBert', modernbert='ModernBert')
LABELS = dict(id2label={'0': 'bad', '1': 'so-so', '2': 'good'},
              label2id={'bad': 0, 'so-so': 1, 'good': 2})
SHAPE = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=9)
heads = lambda name: [
    {}, dict(architectures=None), dict(architectures=[f'{name}Model']),
    dict(architectures=[f'{name}ForMaskedLM']),
    dict(architectures=[f'{name}ForSequenceClassification']) | LABELS,
    dict(architectures=[f'{name}ForSequenceClassification'], num_labels=1),
    dict(architectures=[f'{name}ForTokenClassification'])]
# What each family's variants set beside the defaults; from_hf and to_hf are inverses on them.
VARIANTS = {
    'bert': [*heads('Bert'), SHAPE, dict(type_vocab_size=1, layer_norm_eps=1e-6),
             dict(architectures=['BertForMaskedLM'], hidden_act='gelu_new'),
             dict(max_position_embeddings=64, vocab_size=50), dict(add_pooling_layer=False)],
    'roberta': [*heads('Roberta'), SHAPE, dict(type_vocab_size=1, hidden_act='relu'),
                dict(pad_token_id=0), dict(max_position_embeddings=514, vocab_size=50)],
    'distilbert': [*heads('DistilBert'), dict(dim=32, n_heads=2, n_layers=3, hidden_dim=9),
                   dict(activation='relu', architectures=['DistilBertForMaskedLM']),
                   dict(tie_word_embeddings=False, architectures=['DistilBertForMaskedLM'])],
    'modernbert': [*heads('ModernBert'), SHAPE, dict(local_attention=6, norm_eps=1e-6),
                   dict(norm_bias=True, attention_bias=True, mlp_bias=True, decoder_bias=False),
                   dict(classifier_bias=True, classifier_activation='relu',
                        classifier_pooling='mean',
                        architectures=['ModernBertForSequenceClassification']),
                   dict(tie_word_embeddings=False), dict(hidden_activation='silu'),
                   dict(SHAPE, layer_types=['sliding_attention', 'full_attention',
                                            'full_attention']),
                   dict(rope_parameters=dict(
                       full_attention=dict(rope_type='linear', rope_theta=5., factor=2.,
                                           partial_rotary_factor=1.),
                       sliding_attention=dict(rope_type='default', rope_theta=7.,
                                              partial_rotary_factor=1.)))],
}
CASES = [(family, given) for family, every in VARIANTS.items() for given in every]
REFUSED = [
    ('bert', dict(position_embedding_type='relative_key')),
    ('bert', dict(architectures=['BertForMaskedLM'], tie_word_embeddings=False)),
    ('bert', dict(architectures=['BertForMaskedLM', 'BertModel'])),
    ('bert', dict(hidden_act='mish')),
    ('bert', dict(num_attention_heads=7)),
    ('bert', dict(type_vocab_size=0)),
    ('roberta', dict(architectures=['RobertaForMaskedLM'], tie_word_embeddings=False)),
    ('roberta', dict(pad_token_id=None)),
    ('roberta', dict(pad_token_id=600)),
    ('distilbert', dict(activation='mish')),
    ('distilbert', dict(n_heads=7)),
    ('modernbert', dict(rope_scaling=dict(type='linear', factor=2.))),
    ('modernbert', dict(classifier_pooling='max')),
    ('modernbert', dict(hidden_activation='mish')),
    ('modernbert', dict(layer_types=['full_attention'])),
    ('modernbert', dict(local_attention=0)),
    ('modernbert', dict(sliding_window=7)),
    ('modernbert', dict(rope_parameters=dict(full_attention=dict(rope_type='mrope')))),
    *((family, dict(given)) for family, name in NAMES.items() for given in (
        dict(architectures=[f'{name}ForQuestionAnswering']), dict(is_decoder=True),
        dict(add_cross_attention=True), dict(pruned_heads={'0': [1]}),
        dict(quantization_config=dict(bits=4)),
        dict(architectures=[f'{name}ForTokenClassification'], id2label={'1': 'odd'}),
        dict(architectures=[f'{name}ForTokenClassification'], id2label={'0': 'a'}, num_labels=3))),
]
# Keys that say how a model is trained, begun, run or decoded, not what it computes: an encoder
# without a head has no labels, and DistilBERT's table of positions is in its checkpoint.
ELSEWHERE = re.compile(
    r'.*dropout(_prob)?|initializer_\w+|(bos|eos|pad|cls|sep)_token_id|use_cache|problem_type'
    r'|chunk_size_feed_forward|id2label|label2id|output_.*|return_dict|dtype|transformers_version'
    r'|_name_or_path|model_type|tie_word_embeddings|sinusoidal_pos_embds|sparse_pred\w+'
    r'|deterministic_flash_attn')


def read_by_transformers(family, hf):
  """What transformers makes of a config.json."""
  transformers = pytest.importorskip('transformers')
  hf = {k: v for k, v in hf.items() if k != 'model_type'}
  return transformers.AutoConfig.for_model(family, **hf).to_dict()


@pytest.mark.parametrize(('family', 'given'), CASES)
def test_a_config_survives_the_way_to_hugging_face_and_back(family, given):
  family = FAMILIES[family]
  config = family.from_hf(given)
  assert family.from_hf(family.to_hf(config)) == config


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('family', 'given'), CASES)
def test_absent_keys_mean_what_they_mean_to_transformers(family, given):
  from_hf = FAMILIES[family].from_hf
  assert from_hf(read_by_transformers(family, given)) == from_hf(given)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('family', 'given'), CASES)
def test_transformers_reads_from_what_we_write_what_it_would_have_read(family, given):
  config = FAMILIES[family].from_hf(given)
  ours, theirs = (read_by_transformers(family, hf) for hf in (
      FAMILIES[family].to_hf(config), given))
  unlike = {k: (ours.get(k), v) for k, v in theirs.items() if ours.get(k) != v}
  if not given.get('architectures'):
    assert unlike.pop('architectures') == ([f'{NAMES[family]}Model'], None)
  assert not unlike


@pytest.mark.parametrize(('family', 'given'), REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(family, given):
  with pytest.raises(InputError) as error:
    FAMILIES[family].from_hf(given)
  message = str(error.value)
  assert '\n' not in message
  key = list(given)[-1]
  assert key in message or str(given[key]) in message, message
  if 'QuestionAnswering' in str(given):
    assert f'{NAMES[family]}ForTokenClassification' in message


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', VARIANTS)
def test_every_key_of_a_family_is_read_refused_or_known_to_be_of_no_account(family):
  theirs = read_by_transformers(family, {})
  seen = Seen(theirs)
  FAMILIES[family].from_hf(seen)
  assert not [key for key in theirs if key not in seen.keys_read and not ELSEWHERE.fullmatch(key)]


def test_modernbert_is_read_as_its_first_version_wrote_it():
  """The keys of transformers 4 that 5 writes otherwise."""
  c = FAMILIES['modernbert'].from_hf(dict(
      num_hidden_layers=5, global_attn_every_n_layers=2, local_attention=10, global_rope_theta=50.,
      local_rope_theta=20., position_embedding_type='absolute', layer_norm_eps=1e-5))
  assert [(layer.window, layer.rotary) for layer in c.kinds] == [
      (None, 0), (6, 1), (None, 0), (6, 1), (None, 0)]
  assert [rope.theta for rope in c.attention.ropes] == [50., 20.]
  written = FAMILIES['modernbert'].to_hf(c)
  assert [written[k] for k in ('global_attn_every_n_layers', 'local_attention', 'global_rope_theta',
                               'local_rope_theta')] == [2, 10, 50., 20.]


def test_a_modernbert_begins_with_the_layer_that_does():
  c = FAMILIES['modernbert'].from_hf({})
  with pytest.raises(InputError, match='first layer'):
    FAMILIES['modernbert'].to_hf(dataclasses.replace(c, layers=2, kinds=c.kinds[1:3]))


def test_context_of_roberta_leaves_out_the_positions_of_padding():
  c = FAMILIES['roberta'].from_hf(dict(max_position_embeddings=514))
  assert (c.context, c.positions, c.position_offset) == (512, 514, 2)
