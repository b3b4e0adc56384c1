"""Examples to learn answers from: conversations, instructions and plain texts as tokens.

Which tokens are an answer is found by rendering: what a chat template makes of a conversation up to
a turn, and what it makes of it with the turn, have the turn between them.
"""
import pathlib
from typing import NamedTuple

import numpy as np

from lean_jax.data import chat
from lean_jax.data.text import JsonLines, check_whole
from lean_jax.errors import InputError

# Of models without a chat template: Taori et al. 2023, Stanford Alpaca, the format of its data.
ALPACA = ('Below is an instruction that describes a task{paired}. Write a response that '
          'appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}'
          '### Response:\n')
PAIRED = ', paired with an input that provides further context'
KINDS = ('messages', 'instruction', 'text')
WANTED = 'an example is messages, or instruction and output, or text'


class Example(NamedTuple):
  """A text: ids [T] int32, and which of them are learned, [T] bool."""
  ids: np.ndarray
  learned: np.ndarray


def read_examples(data, tokenizer, template=None):
  """The Examples of a file, or of records.

  A record has `messages` (a conversation, of which the assistant's turns are learned, and perhaps
  `tools`), or `instruction`, `output` and perhaps `input` (of which the output is), or `text` (all
  of it is). Where the tokenizer has a chat template, instructions are conversations too.

  Args:
    data: the path of a .jsonl file, of a .json file with a list, or of a folder of .jsonl files; or
      a list of records.
    tokenizer: a Tokenizer.
    template: of the chat, a name or Jinja; None is the tokenizer's own.

  Raises:
    InputError: no such file, no example in it, or one that cannot be used, with its line.
  """
  return of_records(data, lambda record, where: of_record(record, where, tokenizer, template))


def of_records(data, read):
  """What `read`, (record, where it is) -> a list, makes of all records, in one list."""
  out = []
  for where, record in _records(data):
    try:
      out += read(record, where)
    except InputError as error:
      said = str(error)
      raise error if said.startswith(where) else InputError(f'{where}: {said}') from error
  if not out:
    raise InputError(f'no example in {str(data)!r}; give a line or more')
  return out


def _records(data):
  if isinstance(data, list | tuple):
    yield from ((f'record {k}', record) for k, record in enumerate(data))
    return
  path = pathlib.Path(data)
  if path.is_file() and path.suffix not in ('.jsonl', '.json'):
    raise InputError(f'{str(path)!r} is no .jsonl file; give one with an object a line: messages, '
                     'or instruction and output, or text')
  yield from ((where, record) for _, where, record in JsonLines(str(path)).records())


def of_record(record, where, tokenizer, template=None):
  """The Examples of a record; args as of `read_examples`."""
  if not isinstance(record, dict):
    raise InputError(f'{where}: a {type(record).__name__}, not an object; give objects with '
                     f'{", ".join(KINDS[:-1])} or {KINDS[-1]}')
  found = [kind for kind in KINDS if record.get(kind) is not None]
  if len(found) != 1:
    has = ' and '.join(found) or f'none of it, but {", ".join(map(repr, record)) or "nothing"}'
    raise InputError(f'{where}: {WANTED}; this has {has}')
  if found == ['messages']:
    return of_messages(record['messages'], tokenizer, template, record.get('tools'))
  if found == ['text']:
    ids = tokenizer.encode(text_of(record, 'text', where))
    return [_ended(tokenizer, ids, 0)]
  instruction, output = (text_of(record, key, where) for key in ('instruction', 'output'))
  context = text_of(record, 'input', where, empty=True) if record.get('input') is not None else ''
  if template is not None or chat.templates(tokenizer.settings):
    asked = f'{instruction}\n\n{context}' if context else instruction
    return of_messages([dict(role='user', content=asked), dict(role='assistant', content=output)],
                       tokenizer, template)
  before = ALPACA.format(
      paired=PAIRED if context else '', instruction=instruction,
      input=f'### Input:\n{context}\n\n' if context else '')
  whole, head = tokenizer.encode_batch([before + output, before])
  return [_ended(tokenizer, whole, _common(whole, head))]


def of_messages(messages, tokenizer, template=None, tools=None):
  """The Examples of a conversation: one; or one a turn of the assistant's, where the template
  writes a turn otherwise once others follow it (as those do that drop earlier reasoning).
  """
  messages = chat.checked(messages)
  answers = [k for k, message in enumerate(messages) if message['role'] == 'assistant']
  if not answers:
    raise InputError("the conversation has no turn of role 'assistant' to learn; give one, or "
                     'leave it out')
  if answers[0] == 0:
    raise InputError('the conversation begins with the assistant, whom nothing has asked; put a '
                     'turn before')
  more = {} if tools is None else dict(tools=tools)
  written = lambda count, reply: tokenizer.chat(messages[:count], template=template, reply=reply,
                                                **more)
  turns = [(written(k, True), written(k + 1, False)) for k in answers]
  for k, (before, after) in zip(answers, turns):
    if not after.startswith(before):
      raise InputError(f'the chat template does not begin turn {k + 1} as it asks for one, so that '
                       'its tokens are not known; give another template')
  whole = written(len(messages), False)
  if all(whole.startswith(after) for _, after in turns):
    return [_of_turns(tokenizer, whole, turns)]
  return [_of_turns(tokenizer, after, [(before, after)]) for before, after in turns]


def _of_turns(tokenizer, whole, turns):
  """The Example of a text in which each (before, after) is a beginning: what is between is learned.

  A turn's last token is the one that ends it, where there is one: what a template puts between
  turns is not for the assistant to write.
  """
  ids, *parts = tokenizer.encode_batch([whole, *(text for turn in turns for text in turn)])
  learned = np.zeros(len(ids), bool)
  for before, after in zip(parts[::2], parts[1::2]):
    start, end = _common(ids, before), _common(ids, after)
    stops = np.flatnonzero(np.isin(ids[start:end], tokenizer.ends))
    learned[start:start + stops[-1] + 1 if stops.size else end] = True
  return Example(ids, learned)


def _ended(tokenizer, ids, start):
  """The Example of ids that are learned from `start` on, between what begins and ends a text."""
  head = tokenizer.head if ids[:len(tokenizer.head)].tolist() != tokenizer.head else []
  tail = [] if tokenizer.eos is None else [tokenizer.eos]
  whole = np.concatenate([np.int32(head), ids, np.int32(tail)]).astype(np.int32)
  return Example(whole, np.arange(len(whole)) >= start + len(head))


def _common(ids, other):
  """How many tokens two texts begin with alike. One that reaches over a turn's edge is the turn's
  behind the edge."""
  n = min(len(ids), len(other))
  differ = np.flatnonzero(ids[:n] != other[:n])
  return int(differ[0]) if differ.size else n


def text_of(record, key, where, empty=False, wanted=WANTED):
  """A string of a record; `wanted` says what a record has."""
  if key not in record:
    raise InputError(f'{where}: no {key!r}; {wanted}')
  text = record[key]
  if not isinstance(text, str):
    raise InputError(f'{where}: {key!r} is a {type(text).__name__}, not a string; give a text')
  if not (text or empty):
    raise InputError(f'{where}: {key!r} is empty; give a text, or leave the line out')
  check_whole(text, key, where)
  return text
