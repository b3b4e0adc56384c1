import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_jax.data.tokenizer import load_tokenizer, train_bpe
from lean_jax.errors import InputError

TEXTS = [f'the cat number {i} sat on the mat, naïve ☂\n' * 3 for i in range(50)]


@pytest.fixture(scope='module')
def tokenizer():
  return train_bpe(TEXTS, 300)


# A special token's name in a text is that token, as in transformers: see its own test.
@given(st.text().filter(lambda text: 's>' not in text))
@settings(max_examples=50, deadline=None)
def test_every_text_survives_encoding_and_decoding(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text


def test_a_special_token_is_never_added_and_is_its_id_where_written(tokenizer):
  assert not {0, 1} & set(tokenizer.encode('the cat').tolist())
  ids = tokenizer.encode('<s>the cat</s>')
  assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos) == (0, 1)
  assert tokenizer.decode(ids) == 'the cat'
  assert tokenizer.decode(ids, special=True) == '<s>the cat</s>'


def test_the_same_texts_train_the_same_tokenizer(tokenizer):
  assert train_bpe(iter(TEXTS), 300).fingerprint == tokenizer.fingerprint
  assert train_bpe(TEXTS[1:], 290).fingerprint != tokenizer.fingerprint
  assert tokenizer.size == 300


def test_training_reports_each_text():
  calls = []
  train_bpe(TEXTS, 300, lambda *call: calls.append(call))
  assert [call[:2] for call in calls] == [(i + 1, len(TEXTS)) for i in range(len(TEXTS))]


def test_batches_encode_as_single_texts_do(tokenizer):
  for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bytes_of_all_tokens_are_the_text(tokenizer):
  text = TEXTS[0]
  ids = tokenizer.encode(text)
  assert tokenizer.bytes_of(text, len(ids)) == len(text.encode())
  assert tokenizer.bytes_of(text, 5) == len(tokenizer.decode(ids[:5]).encode())
  assert tokenizer.bytes_of(text, 0) == 0


def test_a_saved_tokenizer_loads_as_itself_and_names_its_class(tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'new')
  loaded = load_tokenizer(tmp_path / 'new')
  assert loaded.fingerprint == tokenizer.fingerprint
  assert load_tokenizer(tmp_path / 'new' / 'tokenizer.json').bos == 0
  written = json.loads((tmp_path / 'new' / 'tokenizer_config.json').read_text())
  assert written['tokenizer_class'] == 'PreTrainedTokenizerFast'
  assert (written['bos_token'], written['eos_token']) == ('<s>', '</s>')
  assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == [
      'tokenizer.json', 'tokenizer_config.json']


def test_the_head_of_a_prompt_is_what_the_rules_put_before_a_text(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  file = tmp_path / 'tokenizer.json'
  assert load_tokenizer(tmp_path).head == [tokenizer.bos]
  file.write_text(json.dumps(dict(json.loads(file.read_text()), post_processor=None)))
  assert load_tokenizer(tmp_path).bos == tokenizer.bos
  assert load_tokenizer(tmp_path).head == []


def test_settings_of_a_loaded_folder_are_saved_again(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  path = tmp_path / 'tokenizer_config.json'
  path.write_text(json.dumps(dict(json.loads(path.read_text()), chat_template='{{ x }}')))
  load_tokenizer(tmp_path).save(tmp_path / 'again')
  again = json.loads((tmp_path / 'again' / 'tokenizer_config.json').read_text())
  assert again['chat_template'] == '{{ x }}'


@pytest.mark.parametrize(('name', 'content', 'bos'), [
    ('tokenizer_config.json', dict(bos_token='</s>'), 1),
    ('tokenizer_config.json', dict(bos_token=dict(content='<s>', lstrip=False)), 0),
    ('tokenizer_config.json', dict(bos_token=None), None),
    ('special_tokens_map.json', dict(bos_token='</s>'), 1),
    ('generation_config.json', dict(bos_token_id=[1, 0]), 1),
    ('config.json', dict(bos_token_id=1), 1), ('config.json', {}, None)])
def test_bos_is_found_where_hugging_face_folders_keep_it(tokenizer, tmp_path, name, content, bos):
  tokenizer.save(tmp_path)
  (tmp_path / 'tokenizer_config.json').unlink()
  if name != 'config.json':
    (tmp_path / 'config.json').write_text(json.dumps(dict(bos_token_id=5)))
  (tmp_path / name).write_text(json.dumps(content))
  assert load_tokenizer(tmp_path).bos == bos


def test_truncation_and_padding_of_a_file_are_switched_off(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  path = tmp_path / 'tokenizer.json'
  rules = json.loads(path.read_text())
  rules['truncation'] = dict(direction='Right', max_length=2, strategy='LongestFirst', stride=0)
  path.write_text(json.dumps(rules))
  np.testing.assert_array_equal(load_tokenizer(tmp_path).encode(TEXTS[0]),
                                tokenizer.encode(TEXTS[0]))


@pytest.mark.parametrize('content', [b'', b'{}', b'[]', b'{"model": ', b'\xff\xfe', b'null'])
def test_a_corrupt_file_is_one_line(content, tmp_path):
  (tmp_path / 'tokenizer.json').write_bytes(content)
  with pytest.raises(InputError, match=r'tokenizer\.json') as caught:
    load_tokenizer(tmp_path)
  assert '\n' not in str(caught.value)


def test_bad_input_says_what_would_do(tokenizer, tmp_path):
  with pytest.raises(InputError, match='258 or more'):
    train_bpe(TEXTS, 100)
  with pytest.raises(InputError, match='no text'):
    train_bpe([], 300)
  with pytest.raises(InputError, match=r'tokenizer\.json'):
    load_tokenizer(tmp_path)
  with pytest.raises(InputError, match='0 to 299'):
    tokenizer.decode([300])
  with pytest.raises(InputError, match='surrogates'):
    tokenizer.encode('\ud800')
  tokenizer.save(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{"bos_token": "<bos>"}')
  with pytest.raises(InputError, match=r'<bos>.*not a token'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text('{')
  with pytest.raises(InputError, match='not JSON'):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize('name', ['spiece.model', 'tokenizer.model', 'vocab.json'])
def test_a_folder_with_an_older_tokenizer_says_how_to_convert_it(name, tmp_path):
  (tmp_path / name).write_bytes(b'rules')
  with pytest.raises(InputError, match=f'{name} and no tokenizer.json; convert it') as caught:
    load_tokenizer(tmp_path)
  assert '\n' not in str(caught.value)


def test_a_real_llama_tokenizer_gives_the_ids_of_the_original(real_data):
  tokenizer = load_tokenizer(real_data / 'models' / 'stories260K')
  assert tokenizer.encode('Once upon a time').tolist() == [403, 407, 261, 378]
  assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (1, 2, 512)
  assert tokenizer.decode([1, 403, 407, 261, 378]) == 'Once upon a time'
  assert len(tokenizer.fingerprint) == hashlib.blake2b(digest_size=16).digest_size * 2
