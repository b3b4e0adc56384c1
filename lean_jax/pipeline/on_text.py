"""Experiments on a model and a text: the command line that they share."""
import argparse
import json
import statistics
import tempfile

import lean_jax as lean
from lean_jax.data.sources import open_source
from lean_jax.data.windows import pack
from lean_jax.pipeline.claims import check


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
  arguments = _arguments(says, argv, model, flags)
  given = {name: getattr(arguments, name) for name in flags}
  loaded = lean.load(arguments.folder)
  with tempfile.TemporaryDirectory() as folder:
    found = measured(loaded, _windows(arguments, loaded, 'all', folder), **given)
  return told(found, claims(found))


def over_seeds(says, measured, claims, argv=None, *, model='a decoder', seeds=3, **flags):
  """`main` of an experiment that trains: its claims are on means over seeds.

  Args:
    measured: (model, training windows, test windows, seed, a keyword for each of `flags`) ->
      {variant: {figure: number}}.
    claims: dicts as of `pipeline.claims.check`, 'variant.figure' on either side.
    seeds: how many, where nobody says.
    says, argv, model, flags: as of `main`; the text is split.
  """
  arguments = _arguments(says, argv, model, dict(
      flags, seeds=dict(type=int, default=seeds, help='how many: 0, 1, ... (%(default)s)')))
  given = {name: getattr(arguments, name) for name in flags}
  loaded = lean.load(arguments.folder)
  found = []
  with tempfile.TemporaryDirectory() as folder:
    windows = [_windows(arguments, loaded, split, folder) for split in ('train', 'test')]
    for seed in range(arguments.seeds):
      found.append(measured(loaded, *windows, seed, **given))
      print(json.dumps({f'seed {seed}': found[-1]}), flush=True)
  return told_of_seeds(found, claims)


def told_of_seeds(found, claims):
  """`told` of claims on means.

  Args:
    found: {variant: {figure: number}} of each seed.
    claims: as of `over_seeds`.
  """
  values = {v: {name: [run[v][name] for run in found] for name in found[0][v]} for v in found[0]}
  means = [dict({name: statistics.fmean(each) for name, each in figures.items()}, name=v)
           for v, figures in values.items()]
  spread = lambda text: '{} {:.4g} ({:.4g} to {:.4g})'.format(text, *(
      f(values[text.rpartition('.')[0]][text.rpartition('.')[2]])
      for f in (statistics.fmean, min, max)))
  return told(values, [
      (f'{row["name"]}: {spread(claim["left"])} < {claim.get("bound", 1)} x '
       f'{spread(claim["right"])}', row['passed'])
      for claim, row in zip(claims, check(claims, means))])


def _arguments(says, argv, model, flags):
  parser = argparse.ArgumentParser(description=says.splitlines()[0])
  flag = parser.add_argument
  flag('folder', metavar='DIR', help=model)
  flag('--data', required=True, help='text, as lean-jax eval takes it')
  flag('--window', type=int, help="tokens (the model's context)")
  flag('--tokens', type=int, help='the first so many; all without')
  for name, settings in flags.items():
    flag(f'--{name}', **settings)
  return parser.parse_args(argv)


def _windows(arguments, loaded, split, folder):
  return pack(open_source(arguments.data), split, loaded.tokenizer,
              arguments.window or loaded.config.context, folder, max_tokens=arguments.tokens)


def told(found, held):
  """Prints figures, and claims [(claim, whether it holds)]; returns the exit code."""
  print(json.dumps(found, indent=2))
  for claim, passed in held:
    print(f'{"pass" if passed else "FAIL"}  {claim}')
  return 0 if all(passed for _, passed in held) else 1
