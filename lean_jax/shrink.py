"""Models in few bits on the command line: `lean-jax quantize`.

The models are imported when a function needs them, so that --help stays light.
"""
import json
import pathlib
import shutil

import lean_jax as lean
from lean_jax.errors import InputError


def add_arguments(parser):
  """The settings of `lean.quantize`, as flags."""
  flag = parser.add_argument
  flag('out', metavar='OUT', help='a new folder, or a file of format gguf')
  flag('--scheme', help='w8a8, w8a16, w4a16-g64, nf4-g64-dq, w2a16-g64, ...')
  flag('--budget', help='in its place: "3.2 bits" a parameter, or bytes, spent on the layers that '
       'calibration text shows to need them; layers are then written out')
  flag('--schemes', help='that a budget is spent on, with commas between (w2a16-g64,w3a16-g64,'
       'w4a16-g64,w8a16-g64)')
  flag('--method', default='rtn', help='rtn, hqq; gptq, awq and smoothquant look at text '
       '(%(default)s)')
  flag('--where', default='(.*/)?layers/.*', help='regular expression on names (%(default)s)')
  flag('--rule', action='append', default=[], metavar='PATTERN=SCHEME', help='weights of another '
       'scheme, or of none: PATTERN=float; again for more, the first that matches counts')
  flag('--set', action='append', default=[], metavar='NAME=VALUE', help='a setting of the method: '
       'clip=mse, damping=0.05, act_order=false, alpha=0.7; again for more')
  flag('--calibration', metavar='F', help='text: file, folder, .jsonl, stdlib or tfds:NAME')
  flag('--samples', type=int, default=64, help='windows of it, or documents (%(default)s)')
  flag('--batch', type=int, default=8, help='of them at a time (%(default)s)')
  flag('--window', type=int, help="tokens a window (the model's context, at most 512)")
  flag('--data', metavar='F', help='text for the perplexity before and after')
  flag('--field', default='text', help="the text's key in JSON (%(default)s)")
  flag('--format', default='lean', help='of OUT: lean, hf, gguf, or for other programs '
       'compressed-tensors, bitsandbytes, gptq, awq (%(default)s)')
  flag('--json', action='store_true')


def run(arguments, console):
  """Writes the model, and prints what each weight became.

  Layers that are finished stand in a folder beside OUT until it is written: the same command goes
  on with them after a kill.

  Raises:
    InputError: OUT is there, or as of `lean.quantize`.
  """
  from lean_jax import tree
  from lean_jax.api.model import FORMATS
  from lean_jax.calibration import quantize as methods
  from lean_jax.files import occupied
  from lean_jax.report.progress import Bars
  a, out = arguments, pathlib.Path(arguments.out)
  if occupied(out):                                    # before the work
    raise InputError(f'{out} is there already; name another')
  if a.format not in FORMATS:
    raise InputError(f'no format {a.format!r}; there are: {", ".join(FORMATS)}')
  check(a)
  model, bars = lean.load(a.folder, scan_layers=False if a.budget else None), Bars()
  rows, kept = [], out.with_name(f'.{out.name}.layers')
  settings = dict(setting(text) for text in a.set)
  which = dict(where=a.where, rules=[rule(text) for text in a.rule])
  if a.budget:
    with bars.bar('measure schemes') as update:
      a.scheme, which = allocated(model, a), {}
      update(1, 1)
  with bars.bar('quantize') as update:
    small = methods.quantize(
        model, a.scheme, a.method, calibration=a.calibration, samples=a.samples, window=a.window,
        batch=a.batch, field=a.field, folder=kept if a.calibration else None, progress=update,
        report=rows, **which, **settings)
  lean.save(small, out, format=a.format)
  shutil.rmtree(kept, ignore_errors=True)
  found = dict(scheme=a.budget or a.scheme, method=a.method, weights=rows,
               bytes_before=tree.nbytes(model.params), bytes_after=tree.nbytes(small.params))
  if a.data:
    for name, which in (('before', model), ('after', small)):
      with bars.bar(f'perplexity {name}') as update:
        found[f'perplexity_{name}'] = lean.evaluate(
            which, a.data, window=a.window, field=a.field, progress=update)['perplexity']
  if a.json:
    print(json.dumps(found))
    return
  console().print(table(rows, found))


def check(a):
  """Raises InputError where arguments do not go together."""
  if bool(a.scheme) == bool(a.budget):
    raise InputError('give --scheme, or --budget in its place')
  if a.schemes and not a.budget:
    raise InputError('--schemes are what a --budget is spent on; give one, or --scheme alone')
  if a.budget and (a.rule or not a.calibration):
    raise InputError('--budget chooses the scheme of each weight by calibration text; give '
                     '--calibration, and no --rule')


def allocated(model, a):
  """Rules of `lean.allocate_bits` by the first windows of the calibration text."""
  from lean_jax.data.packed import packed_windows
  window = a.window or min(model.config.context, 512)
  budget = int(a.budget) if a.budget.isdecimal() else a.budget
  with packed_windows(a.calibration, 'all', model, window, a.field) as windows:
    tokens = windows.array[:min(a.samples, 16)].astype('int32')
  schemes = dict(schemes=tuple(a.schemes.split(','))) if a.schemes else {}
  return lean.allocate_bits(model, tokens, budget, where=a.where, **schemes)


def setting(text):
  """('clip', 'mse') of 'clip=mse'; numbers and true or false are read as such."""
  name, equals, value = text.partition('=')
  if not equals:
    raise InputError(f'--set {text}; give NAME=VALUE, such as clip=mse')
  try:
    return name, json.loads(value)
  except ValueError:
    return name, value


def rule(text):
  """('.*down.*', 'w8a16') of '.*down.*=w8a16'; float is None."""
  pattern, equals, scheme = text.rpartition('=')
  if not equals:
    raise InputError(f'--rule {text}; give PATTERN=SCHEME, such as .*/down/.*=w8a16')
  return pattern, None if scheme == 'float' else scheme


def table(rows, found):
  """What each weight became, and what that made of the model."""
  from rich.table import Table
  says = f'{found["bytes_after"]:,} bytes, were {found["bytes_before"]:,}'
  if 'perplexity_after' in found:
    says += f'; perplexity {found["perplexity_after"]:.3f}, was {found["perplexity_before"]:.3f}'
  out = Table(caption=says)
  for title in ('layer', 'weight', 'scheme', 'bits', 'bytes', 'error', ''):
    out.add_column(title, justify='right' if title in ('bits', 'bytes', 'error') else 'left')
  for r in rows:
    layer = '' if r['layer'] is None else f'{r["stack"]} {r["layer"]}'.strip()
    out.add_row(layer, r['name'], r['scheme'], f'{8 * r["bytes"] / r["parameters"]:.2f}',
                f'{r["bytes"]:,}', f'{100 * r["error"]:.2f}%', r['note'])
  return out
