"""Conversations as text: ours against transformers' own."""
import json

import pytest

from lean_jax.data.tokenizer import load_tokenizer, train_bpe
from tests.data.chats import CONVERSATIONS, TEMPLATES, TOOLS

pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tokenizer')
  train_bpe(['hello there\n' * 9], 270).save(folder)
  return folder


@pytest.mark.parametrize('place', ['config', 'file'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_conversations_are_those_of_transformers(folder, tmp_path, name, place):
  settings = json.loads((folder / 'tokenizer_config.json').read_text())
  (tmp_path / 'tokenizer.json').write_bytes((folder / 'tokenizer.json').read_bytes())
  if place == 'config':
    settings['chat_template'] = TEMPLATES[name]
  else:
    (tmp_path / 'chat_template.jinja').write_text(TEMPLATES[name])
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings | dict(pad_token='</s>')))
  theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
  ours.save(tmp_path / 'ours')
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'ours')
  assert again.pad_token == theirs.pad_token == '</s>'
  for messages in CONVERSATIONS:
    for reply in (True, False):
      for more in (dict(), dict(tools=TOOLS), dict(date_string='26 Jul 2024')):
        how = dict(add_generation_prompt=reply, **more)
        expected = theirs.apply_chat_template(messages, tokenize=False, **how)
        assert ours.chat(messages, reply=reply, **more) == expected
        assert again.apply_chat_template(messages, tokenize=False, **how) == expected
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ours.encode(ours.chat(messages, reply=False)).tolist() == ids
