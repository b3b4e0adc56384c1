"""The command line: `lean-jax VERB ...`.

Exit codes: 0 done; 1 a claim failed or training diverged; 2 the input cannot be used, in one line
that says what to do. Nothing heavy is imported before a verb runs.
"""
import argparse
import importlib.util
import json
import sys

from lean_jax import console, finetuning, peers, plan, shrink, tune
from lean_jax.errors import InputError, LeanError, Preempted
from lean_jax.version import __version__


def main(argv=None):
  """Runs one verb and returns the exit code."""
  parser = _parser()
  arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
  if rest and arguments.verb not in ('demo', 'run', 'plan'):
    parser.error(f'unrecognized arguments: {" ".join(rest)}')
  try:
    return arguments.run(arguments, rest) or 0
  except Preempted as error:
    print(f'lean-jax: {error}', file=sys.stderr)
    return 0
  except (LeanError, OSError) as error:
    print(f'lean-jax: {" ".join(str(error).split())}', file=sys.stderr)
    return 2 if isinstance(error, InputError | OSError) else 1


def _parser():
  parser = argparse.ArgumentParser(
      prog='lean-jax', description='Large language models made lean, in JAX.')
  parser.add_argument('--version', action='version', version=__version__)
  verbs = parser.add_subparsers(dest='verb', required=True, metavar='VERB')

  def verb(name, run, says, example, folder=True):
    p = verbs.add_parser(name, help=says, description=says, epilog=f'example: {example}',
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(run=run)
    if folder:
      p.add_argument('folder', metavar='DIR', help='a Hugging Face or lean_jax model folder, or '
                     'ORGANIZATION/NAME of the hub, or a GGUF file')
    return p

  p = verb('demo', _demo, 'make a small model lean, end to end, on this machine',
           'lean-jax demo', folder=False)
  p.add_argument('--workdir', default='lean_demo', help='everything made goes here (%(default)s)')
  p.add_argument('--json', action='store_true', help='print the report as JSON')
  p = verb('run', _run, 'run an experiment from its config; the same command goes on with it',
           'lean-jax run --config=experiments/lean_pipeline.py:tiny --config.seed=1 '
           '--workdir=tiny', folder=False)
  p.add_argument('--workdir', required=True, help='everything made goes here')
  p.add_argument('--json', action='store_true', help='print the report as JSON')
  p.add_argument('--profile', metavar='FIRST:LAST', help='trace these steps of each training into '
                 'its folder, for XProf or TensorBoard')
  peers.add_arguments(p)
  p = verb('plan', _plan, "a config's training step, compiled for devices that are not there: "
           'bytes, operations, collectives, and whether it fits',
           'lean-jax plan --config=experiments/distill_70b.py --topology=v5e:16x16', folder=False)
  plan.add_arguments(p)
  p = verb('info', _info, 'what a model is: each weight, its kind, shape and bytes; without one, '
           'what this machine runs', 'lean-jax info DIR', folder=False)
  p.add_argument('folder', metavar='DIR', nargs='?', help='a Hugging Face or lean_jax model '
                 'folder, or ORGANIZATION/NAME of the hub, or a GGUF file')
  p.add_argument('--json', action='store_true')
  p = verb('eval', _eval, 'perplexity on text, by the protocol of docs/evaluation.md',
           'lean-jax eval DIR --data stories.jsonl --window 512')
  p.add_argument('--data', required=True, help='file, folder, .jsonl, stdlib or tfds:NAME')
  p.add_argument('--field', default='text', help="the text's key in JSON (%(default)s)")
  p.add_argument('--window', type=int, help="tokens a window (the model's context)")
  p.add_argument('--cache', default='float', help='keys and values as generate --cache keeps them '
                 '(%(default)s)')
  p.add_argument('--json', action='store_true')
  p = verb('generate', _generate, 'text that follows a prompt, or a conversation',
           'lean-jax generate DIR --prompt "Once upon a time" --tokens 100')
  console.add_arguments(p)
  p = verb('quantize', _quantize, 'round the matrices of a model to few bits',
           'lean-jax quantize DIR OUT --scheme w4a16-g64 --method gptq --calibration stories.jsonl')
  shrink.add_arguments(p)
  p = verb('cache-teacher', _cache_teacher, "a teacher's most probable tokens after each of a "
           'text, on disk, for lean.distill(cache=OUT); after a kill the same command goes on',
           'lean-jax cache-teacher DIR OUT --data stories.jsonl --k 64')
  p.add_argument('out', metavar='OUT', help='a folder')
  p.add_argument('--data', required=True, help='file, folder, .jsonl, stdlib or tfds:NAME')
  p.add_argument('--field', default='text', help="the text's key in JSON (%(default)s)")
  p.add_argument('--k', type=int, default=64, help='tokens of a position (%(default)s)')
  p.add_argument('--window', type=int, help="tokens a window (the model's context, at most 512)")
  p.add_argument('--batch', type=int, default=8, help='windows at a time (%(default)s)')
  p = verb('finetune', _finetune, 'train a model, or adapters on it, on examples of answers',
           'lean-jax finetune DIR --data chats.jsonl --method qlora --out ADAPTER')
  finetuning.add_arguments(p)
  p = verb('tune', _tune, "tiles of a TPU's kernels, with no TPU; or the time of each form here",
           'lean-jax tune --device v5e --op int8_matmul --m 4096 --k 4096 --n 4096 --out v5e.json',
           folder=False)
  tune.add_arguments(p)
  return parser


def _demo(arguments, rest):
  spec = importlib.util.find_spec('lean_jax.experiments.lean_pipeline')
  if any(x == '--config' or x.startswith('--config=') for x in rest):
    raise InputError('demo has its own config; for another use: lean-jax run --config=FILE')
  arguments.profile = arguments.hosts = arguments.coordinator = arguments.host = None
  return _run(arguments, [f'--config={spec.origin}', *rest])


def _run(arguments, rest):
  config = _config(rest)
  peers.start(arguments)
  from lean_jax.pipeline.run import run
  from lean_jax.report import table
  from lean_jax.training import hosts
  report = run(config, arguments.workdir, profile=arguments.profile)
  failed = [c['name'] for c in report['claims'] if not c['passed']]
  if not hosts.first():
    return 1 if failed else 0
  if arguments.json:
    print(json.dumps(report))
  else:
    console = _console()
    console.print(table.console_table(report['variants']))
    for c in report['claims']:
      console.print(f'{"pass" if c["passed"] else "FAIL"}  {c["name"]}: '
                    f'{table.figures(c["figures"])}', markup=False)
    sample = report['sample']
    console.print(f'\n{sample["variant"]} writes:\n{sample["text"]}\n', markup=False)
    console.print(f'Report: {arguments.workdir}/report.md, report.json, pareto.png', markup=False)
  if failed:
    print(f'lean-jax: {len(failed)} of {len(report["claims"])} claims failed: '
          f'{"; ".join(failed)}', file=sys.stderr)
  return 1 if failed else 0


def _plan(arguments, rest):
  return plan.run(arguments, lambda: _config(rest), _console())


def _config(rest):
  """The ConfigDict that --config=FILE and --config.KEY=VALUE make."""
  from absl import flags
  from ml_collections import config_flags
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', None, 'the experiment', flag_values=values)
  flags.mark_flag_as_required('config', flag_values=values)
  sys.argv = ['lean-jax', *rest]                       # config_flags looks for overrides there
  try:
    left = values(sys.argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
    raise InputError(f'config: {error}') from error
  if left[1:]:
    raise InputError(f'unrecognized arguments: {" ".join(left[1:])}; see lean-jax --help')
  return values.config


def _info(arguments, _):
  from lean_jax import tree
  from lean_jax.api import load
  from lean_jax.report.kinds import kind
  if arguments.folder is None:
    from lean_jax.report.machine import machine
    found = machine()
    print(json.dumps(found) if arguments.json else
          '\n'.join(f'{name}: {value}' for name, value in found.items()))
    return
  model = load(arguments.folder)
  rows = [dict(name=name, kind=kind(w), shape=list(w.shape), parameters=tree.parameters({'w': w}),
               bytes=tree.nbytes(w)) for name, w in tree.named_weights(model.params).items()]
  total = dict(family=model.family.model_type, parameters=tree.parameters(model.params),
               bytes=tree.nbytes(model.params), weights=rows)
  if arguments.json:
    print(json.dumps(total))
    return
  from rich.table import Table
  table = Table(caption=f'{total["family"]}: {total["parameters"]:,} parameters, '
                f'{total["bytes"]:,} bytes, norms included')
  for title in ('weight', 'kind', 'shape', 'parameters', 'bytes'):
    table.add_column(title, justify='right' if title in ('parameters', 'bytes') else 'left')
  for r in rows:
    table.add_row(r['name'], r['kind'], 'x'.join(map(str, r['shape'])), f'{r["parameters"]:,}',
                  f'{r["bytes"]:,}')
  _console().print(table)


def _eval(arguments, _):
  from lean_jax import api
  from lean_jax.report.progress import Bars
  model = api.load(arguments.folder)
  with Bars().bar('evaluate') as update:
    found = api.evaluate(model, arguments.data, window=arguments.window, field=arguments.field,
                         cache=arguments.cache, progress=update)
  print(json.dumps(found) if arguments.json else
        '\n'.join(f'{k:<14} {v:,.4f}' if isinstance(v, float) else f'{k:<14} {v:,}'
                  for k, v in found.items()))


def _generate(arguments, _):
  console.run(arguments)


def _quantize(arguments, _):
  shrink.run(arguments, _console)


def _cache_teacher(arguments, _):
  from lean_jax import api
  a = arguments
  api.cache_teacher(api.load(a.folder), a.data, a.out, k=a.k, window=a.window, field=a.field,
                    batch=a.batch)


def _finetune(arguments, _):
  finetuning.run(arguments)


def _tune(arguments, _):
  tune.run(arguments, _console)


def _console():
  from rich.console import Console
  width = None if sys.stdout.isatty() else 160
  return Console(highlight=False, width=width)
