"""Sources and their targets: which tokens are which, and rows of one each."""
import json

import numpy as np
import pytest
import tokenizers

from lean_jax.data.source_windows import Pair, arranged, read_pairs
from lean_jax.data.tokenizer import Tokenizer, train_bpe
from lean_jax.errors import InputError

PAIRS = [Pair(np.array(s, np.int32), np.array(t, np.int32)) for s, t in (
    ([5, 6, 1], [7, 8, 9, 1]), ([5, 1], [7, 1]), ([2, 3, 4, 5, 6, 1], [3, 1]))]


@pytest.fixture(scope='module')
def tokenizer():
  """Ends a text as T5's does."""
  made = train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 300)
  made.backend.post_processor = tokenizers.processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', 1)])
  return Tokenizer(made.backend, eos=1)


def test_instructions_and_pairs_are_sources_and_targets_that_end(tokenizer):
  records = [dict(instruction='say', input='the fox', output='a dog', task=3),
             dict(instruction='say', input='', output='a dog'), dict(source='the', target='fox')]
  texts = [(tokenizer.decode(p.source, special=True), tokenizer.decode(p.target, special=True))
           for p in read_pairs(records, tokenizer)]
  assert texts == [('say\n\nthe fox</s>', 'a dog</s>'), ('say</s>', 'a dog</s>'),
                   ('the</s>', 'fox</s>')]


def test_a_tokenizer_that_ends_no_text_gets_its_targets_ended(tokenizer):
  bare = train_bpe(['the fox\n' * 20], 300)            # begins a text, as BART's does
  pair, = read_pairs([dict(source='the', target='fox')], bare)
  assert bare.decode(pair.source, special=True) == '<s>the'
  assert bare.decode(pair.target, special=True) == '<s>fox</s>'


def test_a_row_has_the_target_and_what_comes_before_each_of_its_tokens():
  rows = arranged(PAIRS, 8, 0)
  batch = rows.batch(np.array([0, 1]))
  assert batch['tokens'].tolist() == [[5, 6, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0]]
  assert batch['mask'].sum(axis=1).tolist() == [3, 2]
  assert batch['decoder_tokens'].tolist() == [[0, 7, 8, 9], [0, 7, 0, 0]]
  assert batch['labels'].tolist() == [[7, 8, 9, 1], [7, 1, -1, -1]]
  assert (len(rows), rows.learned, rows.length, rows.cut) == (3, 8, 10, 0)
  assert rows.fingerprint != arranged(PAIRS, 8, 2).fingerprint != arranged(
      PAIRS[::-1], 8, 2).fingerprint


def test_a_long_source_keeps_its_end_and_a_long_target_loses_it():
  rows = arranged(PAIRS, 3, 0)
  assert rows.array.tolist() == [[5, 6, 1], [5, 1, 0], [2, 3, 1]]
  assert rows.labels.tolist() == [[7, 8, 9], [7, 1, -1], [3, 1, -1]] and rows.cut == 2
  with pytest.raises(InputError, match='windows of 1 tokens'):
    arranged(PAIRS, 1, 0)


@pytest.mark.parametrize(('record', 'said'), [
    (dict(text='a'), "source and target; this is 'text'"), ([1], 'this is a list'), ({}, 'nothing'),
    (dict(messages=[]), "this is 'messages'"), (dict(source='a'), "no 'target'; for a target"),
    (dict(source='a', target=''), "'target' is empty"),
    (dict(instruction='a', output='b', input=3), "'input' is a int"),
    (dict(source='a', target='b', instruction='a', output='b'), 'this is source and instruction')])
def test_records_that_are_none_are_named_with_their_line(tokenizer, tmp_path, record, said):
  path = tmp_path / 'some.jsonl'
  path.write_text(json.dumps(dict(source='a', target='b')) + '\n' + json.dumps(record) + '\n')
  with pytest.raises(InputError, match='some.jsonl:2: ') as error:
    read_pairs(path, tokenizer)
  assert said in str(error.value)
