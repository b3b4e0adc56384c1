"""Texts in two tokenizations: spans are of the same characters, rows hold whole spans."""
import numpy as np
import pytest

from lean_jax.data.batches import Batches
from lean_jax.data.paired import cut, pair, paired_windows, read
from lean_jax.data.sources import open_source
from lean_jax.data.tokenizer import Tokenizer, train_bpe
from lean_jax.errors import InputError

TEXTS = ['the quick brown fox jumps over the lazy dog\n' * 3, 'naïve café — größer, 日本語!',
         'the lazy dog, the lazy dog and no fox. ' * 4]


@pytest.fixture(scope='module')
def tokenizers():
  return train_bpe(['the quick brown fox\n' * 20], 300), train_bpe(
      ['the lazy dog jumps over, naïve größer\n' * 20], 330)


@pytest.fixture
def source(tmp_path):
  for k, text in enumerate(TEXTS):
    (tmp_path / f'{k}.txt').write_text(text, encoding='utf-8')
  return open_source(tmp_path)


def texts(tokenizer, tokens, spans):
  """The bytes of each span."""
  pieces = [tokenizer.backend.id_to_token(int(t)) for t in tokens[spans >= 0]]
  joined = [''.join(p for p, s in zip(pieces, spans[spans >= 0]) if s == k)
            for k in range(spans.max() + 1)]
  return joined                                    # both are byte-level: one letter a byte


@pytest.mark.parametrize('length', [12, 40])
def test_spans_are_of_the_same_text_and_cover_all_of_it(tokenizers, source, tmp_path, length):
  one, other = tokenizers
  found = pair(source, 'all', one, other, length, tmp_path)
  whole = {side: '' for side in ('', 'teacher_')}
  for k in range(len(found)):
    row = {name: x[0] for name, x in found.batch(np.array([k])).items()}
    each = [texts(t, row[f'{side}tokens'], row[f'{side}spans'])
            for t, side in ((one, ''), (other, 'teacher_'))]
    assert each[0] == each[1] and all(each[0])
    for side, t, said in (('', one, each[0]), ('teacher_', other, each[1])):
      mask, spans = row[f'{side}mask'], row[f'{side}spans']
      assert row[f'{side}tokens'][0] == t.bos and spans[0] == -1
      np.testing.assert_array_equal(mask, np.arange(length) < mask.sum())
      np.testing.assert_array_equal(spans >= 0, mask & (np.arange(length) > 0))
      whole[side] += ''.join(said)
  level = one.backend.pre_tokenizer
  for side in whole:
    assert whole[side] == ''.join(p for text in TEXTS for p, _ in level.pre_tokenize_str(text))
  assert found.bytes == sum(len(t.encode()) for t in TEXTS)
  assert found.tokens == found.array.size and found.length == length


def test_a_span_longer_than_a_row_is_left_out():
  ids = lambda n: list(range(n))
  one, other = (ids(5), [1, 2, 3, 4, 9]), (ids(6), [1, 5, 6, 7, 8, 9])
  (row, at), = cut(one, other, 4, None, None)
  assert at == (0, 1) and row['size'] == row['teacher_size'] == 1
  rows = list(cut(one, other, 5, None, 7))
  assert [at for _, at in rows] == [(0, 1)]
  np.testing.assert_array_equal(rows[0][0]['teacher_tokens'], [7, 0, 0, 0, 0])
  np.testing.assert_array_equal(rows[0][0]['teacher_spans'], [-1, 0, -1, -1, -1])
  (row, at), = cut(one, other, 6, None, None)
  assert at == (0, 9)
  np.testing.assert_array_equal(row['spans'], [0, 1, 1, 1, 1, -1])


def test_letters_of_several_tokens_end_with_the_last(tokenizers):
  plain = train_bpe(['a'], 259)                    # a token a byte
  (ids, ends), = read(plain, ['é日'])
  assert len(ids) == 5 and ends == [-1, 1, -1, -1, 2]
  (row, _), = cut((ids, ends), ([7, 8], [1, 2]), 6, None, None)
  np.testing.assert_array_equal(row['spans'], [0, 0, 1, 1, 1, -1])
  np.testing.assert_array_equal(row['teacher_spans'][:2], [0, 1])


def test_batches_have_both_and_a_fingerprint_of_all(tokenizers, source, tmp_path):
  one, other = tokenizers
  found = pair(source, 'all', one, other, 9, tmp_path)
  batch = Batches(found, 4, seed=1)[2]
  assert sorted(batch) == sorted(f'{side}{name}' for side in ('', 'teacher_')
                                 for name in ('tokens', 'mask', 'spans'))
  assert {x.shape for x in batch.values()} == {(4, 9)}
  again = pair(source, 'all', one, Tokenizer(other.backend), 9, tmp_path)
  assert again.fingerprint != found.fingerprint
  assert again.batch([0])['teacher_spans'][0, 0] == 0               # without a BOS


def test_what_cannot_be_paired_is_refused(tiny_model, source, tmp_path, tokenizers):
  with pytest.raises(InputError, match='no text of which both'):
    pair(source, 'all', *tokenizers, 1, tmp_path)
  found = pair(source, 'all', *tokenizers, 9, tmp_path)
  for data, window, says in ((found, 9, 'windows are of one tokenizer'),
                             (source, 65, 'the context of 64')):
    with pytest.raises(InputError, match=says), paired_windows(
        data, 'all', tiny_model, [tiny_model], window, 'text'):
      pass
