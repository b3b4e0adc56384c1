"""Experiments on a model and a text: the command line that they share."""
import argparse
import json
import tempfile

import lean_jax as lean
from lean_jax.data.sources import open_source
from lean_jax.data.windows import pack


def main(says, measured, claims, argv=None, *, model='a decoder', **flags):
  """Prints figures and claims, and returns the exit code: 1 where a claim fails.

  Args:
    says: the experiment's docstring.
    measured: (model, windows, a keyword for each of `flags`) -> figures, as JSON holds them.
    claims: figures -> [(claim, whether it holds)].
    argv: the arguments; None is the command line's.
    model: what the folder is to hold.
    flags: {name: settings of argparse} of the experiment's own.
  """
  parser = argparse.ArgumentParser(description=says.splitlines()[0])
  flag = parser.add_argument
  flag('folder', metavar='DIR', help=model)
  flag('--data', required=True, help='text, as lean-jax eval takes it')
  flag('--window', type=int, help="tokens (the model's context)")
  flag('--tokens', type=int, help='the first so many; all without')
  for name, settings in flags.items():
    flag(f'--{name}', **settings)
  arguments = parser.parse_args(argv)
  given = {name: getattr(arguments, name) for name in flags}
  loaded = lean.load(arguments.folder)
  with tempfile.TemporaryDirectory() as folder:
    windows = pack(open_source(arguments.data), 'all', loaded.tokenizer,
                   arguments.window or loaded.config.context, folder,
                   max_tokens=arguments.tokens)
    found = measured(loaded, windows, **given)
  return told(found, claims(found))


def told(found, held):
  """Prints figures, and claims [(claim, whether it holds)]; returns the exit code."""
  print(json.dumps(found, indent=2))
  for claim, passed in held:
    print(f'{"pass" if passed else "FAIL"}  {claim}')
  return 0 if all(passed for _, passed in held) else 1
