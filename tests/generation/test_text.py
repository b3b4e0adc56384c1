"""Texts in, texts out: what `lean.generate` gives, and what it cannot be asked."""
import dataclasses
import re

import jax
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.errors import InputError
from lean_jax.generation import generate
from lean_jax.generation.text import write

PROMPT = 'the quick'


@pytest.fixture(scope='module')
def model(tiny_model):
  larger = lambda x: 3 * x                  # so that texts vary
  return dataclasses.replace(tiny_model, params=dict(
      tiny_model.params, layers=jax.tree.map(larger, tiny_model.params['layers'])))


@pytest.fixture(scope='module')
def text(model):
  return lean.generate(model, PROMPT, tokens=12)


def test_the_text_is_the_prompt_and_what_the_models_tokens_say(model, text):
  out = write(model, PROMPT, tokens=12)
  assert text == out.heads[0] + out.texts[0][0] == model.generate(PROMPT, tokens=12)
  assert text.startswith(PROMPT)
  assert out.read == [1 + len(model.tokenizer.encode(PROMPT))]
  assert out.counts == [[12]] and out.acceptance is None


def test_several_prompts_are_each_by_itself(model, text):
  both = lean.generate(model, [PROMPT, 'dog'], tokens=12)
  assert both == [text, lean.generate(model, 'dog', tokens=12)]


def test_a_prompt_may_begin_with_the_first_token_itself(model, text):
  assert lean.generate(model, '<s>' + PROMPT, tokens=12) == text
  assert write(model, '<s>', tokens=3).read == [1]


def test_samples_follow_the_seed(model):
  how = dict(tokens=8, temperature=2.)
  assert model.generate(PROMPT, **how) == model.generate(PROMPT, **how, seed=0)
  assert model.generate(PROMPT, **how) != model.generate(PROMPT, **how, seed=1)
  four = model.generate(PROMPT, **how, n=4)
  assert len(set(four)) == 4 and all(t.startswith(PROMPT) for t in four)
  assert [len(t) for t in model.generate([PROMPT, 'dog'], **how, n=2)] == [2, 2]


def test_the_stream_is_the_text(model, text):
  parts = []
  assert lean.generate(model, PROMPT, tokens=12, stream=parts.append) == text
  assert PROMPT + ''.join(parts) == text


def test_a_stop_string_ends_the_text(model, text):
  new = text[len(PROMPT):]
  stop = new[4:7]
  wanted = new[:new.index(stop)]
  out = write(model, PROMPT, tokens=12, stop=['no such thing', stop])
  assert out.texts == [[wanted]] and 0 < out.counts[0][0] < 12
  parts = []
  assert model.generate(PROMPT, tokens=12, stop=stop, stream=parts.append) == PROMPT + wanted
  assert ''.join(parts) == wanted
  both = write(model, [PROMPT, 'dog'], tokens=12, stop=stop)
  assert both.texts[0] == [wanted]


def test_a_text_ends_with_any_token_that_ends_one_and_does_not_show_it(model):
  ids = model.tokenizer.encode(PROMPT)
  module, params = model.module, model.params
  new = generate(module, params, np.append([0], ids), tokens=12)
  end = int(new[5])
  first = new.tolist().index(end)
  ended = dataclasses.replace(model, tokenizer=dataclasses.replace(
      model.tokenizer, ends=(1, end)))
  out = write(ended, PROMPT, tokens=12)
  assert out.counts == [[first + 1]]
  assert out.texts[0][0] == model.tokenizer.decode([0, *ids, *new[:first]])[len(PROMPT):]


def test_messages_are_answered(model):
  template = '{{ bos_token }}Q: {{ messages[0].content }} A:'
  chat = dataclasses.replace(model, tokenizer=dataclasses.replace(
      model.tokenizer, settings=dict(chat_template=template)))
  messages = [dict(role='user', content='dog')]
  answer = lean.generate(chat, messages, tokens=5)
  plain = chat.tokenizer.encode(chat.tokenizer.chat(messages))
  new = generate(model.module, model.params, plain, tokens=5)
  assert answer == model.tokenizer.decode(new)
  assert lean.generate(chat, [messages, messages], tokens=5) == [answer] * 2
  with pytest.raises(InputError, match='no chat template'):
    lean.generate(model, messages)


def test_a_vote_takes_the_most_frequent_answer_and_a_scorer_the_best(model):
  how = dict(tokens=6, temperature=3., n=5)
  texts = write(model, PROMPT, **how).texts[0]
  initial = {t: 'a' if k in (1, 2, 4) else str(k) for k, t in enumerate(texts)}
  out = write(model, PROMPT, **how, vote=initial.get)
  assert out.chosen == [1] and out.answers == [['0', 'a', 'a', '3', 'a']]
  assert lean.generate(model, PROMPT, **how, vote=initial.get) == PROMPT + texts[1]
  longest = max(texts, key=len)
  assert lean.generate(model, PROMPT, **how, scorer=len) == PROMPT + longest
  assert write(model, PROMPT, **how, vote=lambda t: None).chosen == [0]


def test_beams_give_their_best_texts(model):
  one = lean.generate(model, PROMPT, tokens=6, beams=3)
  three = lean.generate(model, PROMPT, tokens=6, beams=3, n=3)
  assert three[0] == one and len(set(three)) == 3


def test_a_draft_writes_the_same(model, tiny_model, text):
  out = write(model, PROMPT, tokens=12, draft=tiny_model, ahead=3)
  assert out.heads[0] + out.texts[0][0] == text and 0 <= out.acceptance <= 1
  own = write(model, PROMPT, tokens=12, draft=model, ahead=3)
  assert own.texts == out.texts and own.acceptance == 1


def test_a_prompt_too_long_is_truncated_only_on_request(model):
  long = 'the quick brown fox ' * 40
  with pytest.raises(InputError, match='the context has 64'):
    lean.generate(model, long, tokens=8)
  out = write(model, long, tokens=8, truncate=True)
  ids = model.tokenizer.encode(long)
  assert out.read == [56]
  assert out.heads[0] == model.tokenizer.decode([0, *ids[-55:]])


@pytest.mark.parametrize(('prompt', 'settings', 'message'), [
    ('', dict(), "an empty prompt; give a text, or '<s>'"), ([], dict(), 'no prompt'),
    ([PROMPT, ''], dict(), 'an empty prompt'), (3, dict(), 'a prompt of int'),
    (PROMPT, dict(tokens=0), '0 tokens'), (PROMPT, dict(temperature=-1), 'temperature -1'),
    (PROMPT, dict(top_k=3), 'top_k 3 at temperature 0'), (PROMPT, dict(n=2), 'n 2'),
    (PROMPT, dict(n=3, beams=2), 'n 3 texts of 2 beams'), (PROMPT, dict(beams=0), 'beams 0'),
    (PROMPT, dict(stop=''), 'not empty'), (PROMPT, dict(stop=[3]), 'not empty'),
    (PROMPT, dict(vote=len), 'n above 1'),
    (PROMPT, dict(n=2, temperature=1., vote=len, scorer=len), 'one of them'),
    (PROMPT, dict(n=2, temperature=1., tokens=4, scorer=lambda t: 'good'), 'gives a number'),
    (PROMPT, dict(beams=2, temperature=1.), 'a temperature'),
    (PROMPT, dict(beams=2, stop='a'), 'stop strings'),
    (PROMPT, dict(beams=2, stream=print), 'a stream'),
    ([PROMPT] * 2, dict(stream=print), 'a stream of several')])
def test_what_cannot_be_asked_is_one_line(model, prompt, settings, message):
  with pytest.raises(InputError, match=re.escape(message)) as error:
    lean.generate(model, prompt, **settings)
  assert '\n' not in str(error.value)


def test_a_draft_of_other_tokens_is_refused(model, tiny_model):
  other = dataclasses.replace(tiny_model, tokenizer=dataclasses.replace(
      tiny_model.tokenizer, bos=None))
  with pytest.raises(InputError, match='another tokenizer'):
    lean.generate(model, PROMPT, draft=other)
