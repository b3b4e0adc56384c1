"""Chat templates: a conversation as the text that a model was trained to go on from.

A template is a Jinja program that comes with a tokenizer, from whoever made it. It runs in Jinja's
sandbox and sees nothing but plain data.
"""
import datetime
import functools
import json
import pathlib

from lean_jax.data import reading
from lean_jax.errors import InputError

SPECIAL = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token',
           'mask_token')


def rendered(template, messages, *, special=None, reply=True, tools=None, documents=None,
             now=datetime.datetime.now, **values):
  """The text of a conversation.

  Args:
    template: Jinja, as in Hugging Face's tokenizers.
    messages: dicts, each with a 'role' and mostly a 'content'; what else the template reads.
    special: {name: text} of special tokens, 'bos_token' and the like.
    reply: whether the head of the assistant's next message follows.
    tools, documents: JSON, for templates that read them.
    now: what `strftime_now` in a template tells.
    values: any other names that the template reads.

  Raises:
    InputError: messages are no such list, the template is none, or it refuses them.
  """
  given = dict(messages=checked(messages), tools=tools, documents=documents, **values)
  try:
    given = json.loads(json.dumps(given))
  except (TypeError, ValueError) as error:
    raise InputError(f'a conversation is made of JSON: texts, numbers, lists and dicts ({error}); '
                     'give that') from error
  program = compiled(template)
  try:
    return program.render(**(special or {}) | given, add_generation_prompt=reply,
                          strftime_now=lambda form: now().strftime(form))
  except Exception as error:              # a template may fail in any way that a program may
    raise InputError(f'the chat template refuses this conversation: {error}; give messages as its '
                     'model expects them') from error


def checked(messages):
  """The messages, without keys that are None; raises InputError where they are not messages."""
  if not isinstance(messages, list | tuple) or not messages:
    raise InputError(f'messages {messages!r}; give a list of one message or more')
  for message in messages:
    if not isinstance(message, dict) or not isinstance(message.get('role'), str):
      raise InputError(f"message {message!r}; give dicts like dict(role='user', content='Hello')")
  return [{k: v for k, v in message.items() if v is not None} for message in messages]


@functools.lru_cache
def compiled(template):
  """The program of a template; raises InputError where it is none."""
  import jinja2
  try:
    return environment().from_string(template)
  except jinja2.TemplateError as error:
    raise InputError(f'the chat template is not Jinja ({error}); download the tokenizer '
                     'again') from error


@functools.cache
def environment():
  """The sandbox that templates run in, with what Hugging Face's have at hand."""
  import jinja2
  import jinja2.ext
  import jinja2.sandbox

  class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks what an assistant said, and is that."""
    tags = frozenset({'generation'})

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  def refuse(message):
    raise jinja2.TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

  made = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
  made.filters['tojson'] = tojson                             # Jinja's own escapes HTML
  made.globals['raise_exception'] = refuse
  return made


def templates(settings):
  """{name: template} of tokenizer_config.json; 'default' is the one that is used."""
  found = settings.get('chat_template') or {}
  if isinstance(found, str):
    return dict(default=found)
  try:
    return dict(found) if isinstance(found, dict) else {t['name']: t['template'] for t in found}
  except (KeyError, TypeError) as error:
    raise InputError('chat_template in tokenizer_config.json is neither a text nor a list of names '
                     'and templates; download the tokenizer again') from error


def with_files(folder, settings):
  """tokenizer_config.json with the templates that a folder has in files of their own."""
  folder = pathlib.Path(folder)
  files = {'default': folder / 'chat_template.jinja'} | {
      path.stem: path for path in sorted((folder / 'additional_chat_templates').glob('*.jinja'))}
  read = {name: reading.read(path).decode() for name, path in files.items() if path.is_file()}
  if not read:
    return settings
  found = templates(settings) | read
  only = found['default'] if list(found) == ['default'] else [
      dict(name=name, template=template) for name, template in found.items()]
  return settings | dict(chat_template=only)


def special_tokens(settings):
  """{name: text} of the special tokens that tokenizer_config.json names."""
  extra = settings.get('extra_special_tokens')
  found = {k: settings[k] for k in SPECIAL if k in settings} | (
      extra if isinstance(extra, dict) else {})
  text = {k: v.get('content') if isinstance(v, dict) else v for k, v in found.items()}
  return {k: v for k, v in text.items() if isinstance(v, str)}
