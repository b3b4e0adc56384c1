"""Conversations as text, by the template that comes with a tokenizer."""
import dataclasses
import datetime
import json

import pytest

from lean_jax.data.chat import rendered
from lean_jax.data.tokenizer import load_tokenizer, train_bpe
from lean_jax.errors import InputError
from tests.data.chats import CHATML, HELLO, LLAMA3, MISTRAL, TOOLS


@pytest.fixture(scope='module')
def tokenizer():
  return train_bpe(['hello there\n' * 9], 270)


def with_template(tokenizer, template, **settings):
  return dataclasses.replace(tokenizer, settings=dict(chat_template=template, **settings))


def test_a_conversation_is_its_templates_text(tokenizer):
  made = with_template(tokenizer, MISTRAL)
  assert made.chat([HELLO]) == f'<s>[INST] {HELLO["content"]}[/INST]'
  assert made.encode(made.chat([HELLO]))[0] == made.bos
  made = with_template(tokenizer, CHATML)
  assert made.chat([HELLO]).endswith('<|im_start|>assistant\n')
  assert made.chat([HELLO], reply=False).endswith('<|im_end|>\n')


def test_the_clock_of_a_template_is_a_parameter():
  day = datetime.datetime(2024, 7, 26)
  text = rendered(LLAMA3, [HELLO], special=dict(bos_token='<s>'), now=lambda: day)
  assert text.startswith('<s><|start_header_id|>system') and 'Today: Jul 2024\n' in text


def test_templates_are_read_from_each_of_their_places_and_saved(tokenizer, tmp_path):
  plain, own = tmp_path / 'plain', tmp_path / 'own'
  tokenizer.save(plain)
  path = plain / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(chat_template='{{ 1 }}')))
  (plain / 'special_tokens_map.json').write_text(json.dumps(
      dict(pad_token=dict(content='<s>'), bos_token='</s>')))
  (plain / 'config.json').write_text(json.dumps(dict(eos_token_id=[1, 5])))
  (plain / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[7, 1])))
  loaded = load_tokenizer(plain)
  assert loaded.chat([HELLO]) == '1'
  assert loaded.chat([HELLO], template='{{ pad_token + bos_token }}') == '<s><s>'
  assert loaded.ends == (1, 7, 5)
  (plain / 'chat_template.jinja').write_text('{{ 2 }}')
  (plain / 'additional_chat_templates').mkdir()
  (plain / 'additional_chat_templates' / 'tool_use.jinja').write_text('{{ tools | length }}')
  load_tokenizer(plain).save(own)
  again = load_tokenizer(own)
  assert again.chat([HELLO]) == '2'
  assert again.chat([HELLO], tools=TOOLS) == again.chat([HELLO], template='tool_use',
                                                        tools=TOOLS) == '1'
  assert json.loads((own / 'tokenizer_config.json').read_text())['pad_token']['content'] == '<s>'


@pytest.mark.parametrize(('template', 'messages', 'message'), [
    (None, [HELLO], 'no chat template: its model was not trained on'),
    (MISTRAL, [HELLO, HELLO], 'roles must alternate'),
    (MISTRAL, [], r'messages \[\]; give a list'), (MISTRAL, 'Hello', "messages 'Hello'"),
    (MISTRAL, ['Hello'], "message 'Hello'; give dicts"),
    (MISTRAL, [dict(content='Hello')], 'give dicts'),
    (MISTRAL, [dict(role='user')], 'refuses this conversation'),
    (MISTRAL, [dict(role='user', content={1, 2})], 'made of JSON'),
    ('{% if %}', [HELLO], 'not Jinja'), (7, [HELLO], 'neither a text nor'),
    ('{{ messages.__class__.__base__.__subclasses__() }}', [HELLO], 'refuses this'),
    ('{{ messages.append(1) }}', [HELLO], 'refuses this'),
    ('{{ 1 / 0 }}', [HELLO], 'refuses this')])
def test_what_cannot_be_a_conversation_is_one_line(tokenizer, template, messages, message):
  made = with_template(tokenizer, template)
  with pytest.raises(InputError, match=message) as error:
    made.chat(messages)
  assert '\n' not in str(error.value)


def test_an_unknown_name_lists_the_templates(tokenizer):
  made = with_template(tokenizer, [dict(name='default', template='a'),
                                   dict(name='rag', template='b')])
  assert made.chat([HELLO], template='rag') == 'b'
  with pytest.raises(InputError, match="'tools', it has: default, rag"):
    made.chat([HELLO], template='tools')
