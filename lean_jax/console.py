"""Text and conversations on the command line: `lean-jax generate`.

The models are imported when a function needs them, so that --help stays light.
"""
import json
import re
import sys
import time

import lean_jax as lean
from lean_jax.errors import InputError

SETTINGS = ('tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'stop',
            'seed', 'n', 'beams', 'length_penalty', 'ahead', 'truncate', 'cache')


def add_arguments(parser):
  """The settings of `text.write`, as flags."""
  flag = parser.add_argument
  flag('--adapter', metavar='A', help='a folder of lean-jax finetune or of the PEFT library')
  flag('--prompt', help='a text; with --chat what the user says, without it a conversation on the '
       'console, a line each')
  flag('--chat', action='store_true', help="by the model's chat template")
  flag('--system', help='with --chat, what the system says first')
  flag('--tokens', type=int, default=64, help='at most (%(default)s)')
  flag('--temperature', type=float, default=0., help='0 is greedy (%(default)s)')
  flag('--top-k', type=int, help='of the K most probable tokens')
  flag('--top-p', type=float, help='of the fewest tokens that have this probability together')
  flag('--min-p', type=float, help='of tokens with this part of the greatest probability')
  flag('--repetition-penalty', type=float, help='above 1: tokens that are there come more rarely')
  flag('--stop', action='append', default=[], help='a string that ends the text; again for more')
  flag('--seed', type=int, default=0)
  flag('--n', type=int, default=1, help='texts (%(default)s)')
  flag('--vote', metavar='REGEX', help='of n texts one whose answer most have: what REGEX finds '
       'last, its first group where it has one')
  flag('--beams', type=int, default=1, help='candidates of a beam search (%(default)s: none)')
  flag('--length-penalty', type=float, default=1., help='of the beam search (%(default)s)')
  flag('--draft', metavar='DIR', help='a smaller model of the same tokenizer that proposes tokens')
  flag('--ahead', type=int, default=4, help='how many at a time (%(default)s)')
  flag('--cache', default='float', help='how keys and values are kept: float, int8 or int4 '
       '(%(default)s)')
  flag('--truncate', action='store_true', help='cut a prompt that the context has no room for')
  flag('--stream', action='store_true', help='print the text as it comes')
  flag('--json', action='store_true', help='texts, tokens a second, drafted tokens kept, bytes of '
       'the cache')


def run(arguments):
  """Prints what a model writes.

  Raises:
    InputError: flags that exclude each other, or a setting out of range.
  """
  from lean_jax.generation.text import reads, write
  if arguments.prompt is None and not arguments.chat:
    raise InputError('no prompt; give --prompt TEXT, or --chat for a conversation')
  if arguments.system is not None and not arguments.chat:
    raise InputError('--system without --chat; add --chat')
  if arguments.json and (arguments.stream or arguments.prompt is None):
    raise InputError('--json prints a whole text at once; leave --stream out, and give a --prompt')
  settings = {name: getattr(arguments, name) for name in SETTINGS}
  settings['vote'] = None if arguments.vote is None else answer(arguments.vote)
  if arguments.prompt is None and (arguments.n > 1 or arguments.beams > 1):
    raise InputError('a conversation has one answer at a time; give a --prompt, or leave --n and '
                     '--beams out')
  model = lean.load(arguments.folder)
  if arguments.adapter is not None:
    model = lean.load_adapter(model, arguments.adapter)
  settings['draft'] = None if arguments.draft is None else lean.load(arguments.draft)
  before = [] if arguments.system is None else [dict(role='system', content=arguments.system)]
  if arguments.prompt is None:
    conversation(model, before, settings)
    return
  prompt = arguments.prompt
  if arguments.chat:
    prompt = [*before, dict(role='user', content=prompt)]
  if arguments.stream:
    begins = '' if arguments.chat or reads(model) else prompt
    write(model, prompt, stream=printer(begins), **settings)
    print()
    return
  start = time.perf_counter()
  out = write(model, prompt, **settings)
  texts = [out.heads[0] + text for text in out.texts[0]]
  chosen = None if out.chosen is None else out.chosen[0]
  if arguments.json:
    seconds = time.perf_counter() - start
    print(json.dumps(dict(
        texts=texts, tokens=out.counts[0], prompt_tokens=out.read[0], chosen=chosen,
        answers=None if out.answers is None else out.answers[0], seconds_with_compilation=seconds,
        tokens_per_second=sum(out.counts[0]) / seconds, drafted=out.drafts[0],
        drafted_kept=out.acceptance, cache_bytes=out.cache_bytes)))
    return
  for text in texts if chosen is None else [texts[chosen]]:
    print(text)


def conversation(model, messages, settings):
  """Answers the lines of the standard input, in turns, until it ends."""
  from lean_jax.generation.text import write
  asks = '> ' if sys.stdin.isatty() else ''
  while True:
    try:
      line = input(asks)
    except EOFError:
      return
    if not line.strip():
      continue
    messages = [*messages, dict(role='user', content=line)]
    out = write(model, messages, stream=printer(''), **settings)
    print()
    messages = [*messages, dict(role='assistant', content=out.texts[0][0])]


def printer(begins):
  """A function that prints pieces of a text where the last one ended; it prints `begins` at once.
  """
  def show(piece):
    print(piece, end='', flush=True)
  show(begins)
  return show


def answer(pattern):
  """A function that gives what a pattern finds last in a text, None where it finds nothing."""
  try:
    compiled = re.compile(pattern)
  except re.error as error:
    raise InputError(f'--vote {pattern!r} is no regular expression: {error}') from error

  def found(text):
    all_found = list(compiled.finditer(text))
    return all_found[-1].group(1 if compiled.groups else 0) if all_found else None
  return found
