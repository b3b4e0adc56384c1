import json

import pytest

from lean_jax.data.tokenizer import load_tokenizer
from lean_jax.errors import InputError

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the', 'cat', '##s', 'sat', 'e', ',', '中']


def folder(path, words=WORDS, kind='bert', **settings):
  (path / 'vocab.txt').write_text('\n'.join(words) + '\n', encoding='utf-8')
  (path / 'config.json').write_text(json.dumps(dict(model_type=kind)))
  (path / 'tokenizer_config.json').write_text(json.dumps(settings))
  return path


def test_a_vocabulary_is_a_tokenizer(tmp_path):
  tokenizer = load_tokenizer(folder(tmp_path))
  assert tokenizer.encode('The CATS,É 中[MASK] dog').tolist() == [5, 6, 7, 10, 9, 11, 4, 1]
  (ids, types), (alone, _) = tokenizer.rows([('the cat', 'sat'), 'the'])
  assert ids.tolist() == [2, 5, 6, 3, 8, 3] and types.tolist() == [0, 0, 0, 0, 1, 1]
  assert alone.tolist() == [2, 5, 3]
  assert (tokenizer.bos, tokenizer.eos, tokenizer.size) == (None, None, len(WORDS))
  assert tokenizer.decode(ids) == 'the cat sat'


def test_settings_of_a_vocabulary_count(tmp_path):
  words = [*WORDS[:5], 'The', '##É', 'the']
  tokenizer = load_tokenizer(folder(tmp_path, words, do_lower_case=False,
                                    tokenizer_class='BertTokenizer'))
  assert tokenizer.encode('The TheÉ the').tolist() == [5, 5, 6, 7]


def test_a_vocabulary_is_saved_as_a_tokenizer(tmp_path):
  tokenizer = load_tokenizer(folder(tmp_path))
  tokenizer.save(tmp_path / 'again')
  again = load_tokenizer(tmp_path / 'again')
  assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(('changes', 'words'), [
    (dict(kind='layoutlm'), 'layoutlm'), (dict(tokenizer_class='EsmTokenizer'), 'EsmTokenizer'),
    (dict(words=WORDS[1:]), r'lacks \[PAD\]'), (dict(cls_token='<s>'), 'lacks <s>')])
def test_what_is_no_vocabulary_of_bert_is_refused(tmp_path, changes, words):
  with pytest.raises(InputError, match=words) as error:
    load_tokenizer(folder(tmp_path, **changes))
  assert '\n' not in str(error.value)


def test_a_damaged_vocabulary_is_one_line(tmp_path):
  folder(tmp_path)
  (tmp_path / 'vocab.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(InputError, match='not UTF-8'):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize(('most', 'ids'), [(4, [2, 5, 8, 3]), (5, [2, 5, 6, 7, 3])])
def test_a_long_text_loses_its_end_and_keeps_what_is_around_it(tmp_path, most, ids):
  words = [*WORDS[:5], 'a', 'b', 'c', 'd']
  text = 'a b c d' if most == 5 else 'a d b c'
  tokenizer = load_tokenizer(folder(tmp_path, words))
  assert tokenizer.rows([text], most=most)[0][0].tolist() == ids
  pair, whole = tokenizer.rows([('a b c d', 'a'), ('a', 'b')], most=6)
  assert pair[0].tolist() == [2, 5, 6, 3, 5, 3] and whole[0].tolist() == [2, 5, 3, 6, 3]
  assert tokenizer.rows([text])[0][0].size == 6            # the tokenizer itself still cuts nothing
  with pytest.raises(InputError, match='2 tokens leave no room'):
    tokenizer.rows([text], most=2)
