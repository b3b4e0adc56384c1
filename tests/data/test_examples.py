"""Examples: which tokens are an answer, and rows that hold them apart."""
import json

import numpy as np
import pytest
import tokenizers

from lean_jax.data.example_windows import arranged
from lean_jax.data.examples import Example, read_examples
from lean_jax.data.tokenizer import Tokenizer, train_bpe
from lean_jax.errors import InputError
from tests.data.chats import CHATML, LLAMA3, MISTRAL

TALK = [dict(role='user', content='How are you?'), dict(role='assistant', content='Fine, fox.'),
        dict(role='user', content='The dog?'), dict(role='assistant', content='Lazy.')]
# Drops what an earlier answer thought, as templates of reasoning models do.
FORGETS = """{% for m in messages %}<{{ m.role }}>
{% if m.role == 'assistant' and loop.last %}{{ m.content }}{% elif m.role == 'assistant' %}\
{{ m.content.split('|')[-1] }}{% else %}{{ m.content }}{% endif %}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""


@pytest.fixture(scope='module')
def tokenizer():
  made = train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 300)
  special = ['<|im_start|>', '<|im_end|>', '<|eot_id|>', '<end>']
  made.backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
  ends = tuple(made.backend.token_to_id(t) for t in special[1:])
  return Tokenizer(made.backend, made.bos, made.eos, {}, ends)


def answers(tokenizer, example):
  """The texts of the runs of learned tokens."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], example.learned, [0]])))
  return [tokenizer.decode(example.ids[a:b], special=True)
          for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize(('template', 'end'), [
    (CHATML, '<|im_end|>'), (LLAMA3, '<|eot_id|>'), (MISTRAL, '</s>')])
def test_the_assistant_s_turns_are_learned_up_to_their_ends(tokenizer, template, end):
  example, = read_examples([dict(messages=TALK)], tokenizer, template)
  said = [text.strip() for text in answers(tokenizer, example)]
  assert said == [f'Fine, fox.{end}', f'Lazy.{end}']
  assert tokenizer.decode(example.ids, special=True) == tokenizer.chat(
      TALK, template=template, reply=False)
  # what the model is given when it is to answer is what stands before the first learned token
  given = tokenizer.encode(tokenizer.chat(TALK[:1], template=template))
  first = int(np.flatnonzero(example.learned)[0])
  np.testing.assert_array_equal(example.ids[:first], given)


def test_a_template_that_forgets_gives_an_example_a_turn(tokenizer):
  talk = [dict(m, content=f'hm|{m["content"]}') for m in TALK]
  first, second = read_examples([dict(messages=talk)], tokenizer, FORGETS)
  assert answers(tokenizer, first) == ['hm|Fine, fox.<end>']
  assert answers(tokenizer, second) == ['hm|Lazy.<end>']
  assert 'hm|Fine' not in tokenizer.decode(second.ids)


def test_an_instruction_is_alpaca_s_prompt_or_a_conversation(tokenizer):
  record = dict(instruction='Name an animal.', input='the quick one', output='The fox.')
  example, = read_examples([record], tokenizer)
  text = tokenizer.decode(example.ids, special=True)
  assert text == (
      '<s>Below is an instruction that describes a task, paired with an input that provides '
      'further context. Write a response that appropriately completes the request.\n\n'
      '### Instruction:\nName an animal.\n\n### Input:\nthe quick one\n\n### Response:\nThe fox.'
      '</s>')
  assert answers(tokenizer, example) == ['The fox.</s>']
  example, = read_examples([record], tokenizer, CHATML)
  assert answers(tokenizer, example) == ['The fox.<|im_end|>']
  alone, = read_examples([record | dict(input='')], tokenizer)
  assert '### Input' not in tokenizer.decode(alone.ids) and 'paired' not in tokenizer.decode(
      alone.ids)


def test_all_of_a_text_is_learned(tokenizer, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(json.dumps(dict(text=t)) for t in ('the fox', 'the dog')))
  one, two = read_examples(path, tokenizer)
  assert tokenizer.decode(one.ids, special=True) == '<s>the fox</s>'
  assert not one.learned[0] and one.learned[1:].all() and len(two.ids) > 3


@pytest.mark.parametrize(('line', 'said'), [
    ('{"text": "a"', 'not JSON'), ('[1]', 'not an object'), ('{"prompt": "a"}', "but 'prompt'"),
    ('{"text": "a", "messages": []}', 'messages and text'), ('{"text": 3}', 'is a int'),
    ('{"text": ""}', "'text' is empty"), ('{"instruction": "a"}', "no 'output'"),
    ('{"instruction": "a", "output": null}', 'is a NoneType'),
    ('{"instruction": "a", "output": "b", "input": 1}', "'input' is a int"),
    ('{"text": "\\ud800"}', 'surrogate'), ('{"messages": []}', 'one message or more'),
    ('{"messages": [{"content": "a"}]}', 'give dicts like'),
    ('{"messages": [{"role": "user", "content": "a"}]}', "no turn of role 'assistant'"),
    ('{"messages": [{"role": "assistant", "content": "a"}]}', 'begins with the assistant')])
def test_a_line_that_is_no_example_is_named(tokenizer, tmp_path, line, said):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{{"text": "the fox"}}\n\n{line}\n')
  with pytest.raises(InputError, match=said) as error:
    read_examples(path, tokenizer)
  assert str(error.value).startswith(f'{path}:3: ') and '\n' not in str(error.value)


def test_files_that_hold_no_examples_are_refused(tokenizer, tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('the fox')
  with pytest.raises(InputError, match='no .jsonl'):
    read_examples(path, tokenizer)
  (tmp_path / 'b.jsonl').write_text('\n')
  with pytest.raises(InputError, match='no example'):
    read_examples(tmp_path / 'b.jsonl', tokenizer)
  with pytest.raises(InputError, match='chat template'):
    read_examples([dict(messages=TALK)], tokenizer)
  odd = ('{% for m in messages %}{{ m.content }}{% endfor %}'
         '{% if add_generation_prompt %}?{% endif %}')
  with pytest.raises(InputError, match='record 0: the chat template does not begin turn 2'):
    read_examples([dict(messages=TALK)], tokenizer, odd)


def example(n, learned):
  ids = np.arange(1, n + 1, dtype=np.int32)
  return Example(ids, ids > n - learned)


def test_rows_hold_each_example_once_and_apart():
  rng = np.random.default_rng(0)
  examples = [example(int(n), int(rng.integers(1, n))) for n in rng.integers(2, 17, 60)]
  rows = arranged(examples, 16)
  assert rows.packed and rows.examples == 60 and not rows.cut and not rows.left_out
  found = []
  for ids, segments, labels in zip(rows.array, rows.segments, rows.labels):
    for s in range(1, segments.max() + 1):
      at = np.flatnonzero(segments == s)
      assert (np.diff(at) == 1).all()
      own = ids[at]
      wanted = labels[at]
      assert wanted[-1] == -1 and set(wanted[:-1] - own[1:]) <= {0, *(-1 - own[1:])}
      found.append((len(own), int((wanted >= 0).sum())))
  assert sorted(found) == sorted((len(e.ids), int(e.learned.sum())) for e in examples)
  assert (rows.labels[rows.segments == 0] == -1).all()
  # best-fit decreasing needs at most 11/9 of the fewest rows, and one more
  assert len(rows) <= 11 / 9 * -(-sum(len(e.ids) for e in examples) // 16) + 1
  alone = arranged(examples, 64, packed=False)
  assert len(alone) == 60 and alone.length == 16 and alone.learned == rows.learned
  assert alone.batch(np.array([3]))['mask'].sum() == len(examples[3].ids)
  assert rows.fingerprint != alone.fingerprint == arranged(examples, 64, packed=False).fingerprint


def test_what_has_no_room_is_cut_or_left_out_and_counted():
  rows = arranged([example(10, 8), example(10, 2), example(4, 2)], 6)
  assert (rows.examples, rows.cut, rows.left_out) == (2, 1, 1)
  whole = arranged([Example(np.arange(10, dtype=np.int32), np.arange(10) >= 1)], 6)
  assert whole.examples == 2 and whole.learned == 8 and not whole.cut
  with pytest.raises(InputError, match='none of 1 examples'):
    arranged([example(10, 2)], 6)
  with pytest.raises(InputError, match='windows of 1'):
    arranged([example(10, 2)], 1)
