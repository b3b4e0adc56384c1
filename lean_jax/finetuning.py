"""Fine-tuning on the command line: `lean-jax finetune`.

The models are imported when a function needs them, so that --help stays light.
"""
import json
import pathlib
import shutil

import lean_jax as lean
from lean_jax.errors import InputError
from lean_jax.shrink import setting


def add_arguments(parser):
  """The settings of `lean.finetune`, as flags."""
  flag = parser.add_argument
  flag('--data', required=True, metavar='F', help='.jsonl, or a folder of them: an object a line '
       'with messages, or instruction, input and output, or text; of an encoder-decoder with '
       'source and target, or instruction, input and output')
  flag('--out', required=True, metavar='OUT', help='a new folder: of an adapter for the PEFT '
       'library, or of a whole model where PEFT has no such adapter')
  flag('--method', default='qlora', help='qlora, lora, dora, vera, pissa, ia3; houlsby, pfeiffer, '
       'parallel; prefix, p_tuning_v2, prompt; bitfit, full (%(default)s)')
  flag('--set', action='append', default=[], metavar='NAME=VALUE', help='a setting of the '
       'adapter: rank=16, alpha=32, dropout=0.05, scaling=rank_stabilised, where=.*/(q|v)/.*; '
       'again for more')
  flag('--epochs', type=float, default=3., help='how often every example is seen (%(default)s)')
  flag('--steps', type=int, help='in their place')
  flag('--batch', type=int, default=8, help='rows a step (%(default)s)')
  flag('--window', type=int, help="tokens a row (the model's context, at most 2048)")
  flag('--peak', type=float, help="the greatest learning rate (the method's usual one)")
  flag('--warmup', type=int, default=0, help='steps up to it (%(default)s)')
  flag('--no-packing', action='store_true', help='an example a row; else several, which do not '
       'see each other')
  flag('--template', metavar='T', help='of conversations: a Jinja file, or a '
       "name (the model's own)")
  flag('--seed', type=int, default=0)
  flag('--json', action='store_true')


def run(arguments):
  """Writes the adapter or the model, and prints what it was trained on.

  Checkpoints and metrics stand in a folder beside OUT until it is written: the same command goes
  on from them after a kill.

  Raises:
    InputError: OUT is there, or as of `lean.finetune`.
  """
  from lean_jax.api.training import begin, follow
  from lean_jax.data.batches import Batches
  from lean_jax.files import occupied
  from lean_jax.report.progress import Bars, training
  from lean_jax.training import finetune, recipe
  from lean_jax.training.signals import termination
  a, out = arguments, pathlib.Path(arguments.out)
  if occupied(out):                                    # before the work
    raise InputError(f'{out} is there already; name another')
  bars, adapter = Bars(), dict(setting(text) for text in a.set)
  with bars.bar('load') as update:
    model = lean.load(a.folder)
    windows = finetune.example_windows(
        model, a.data, window=a.window, packing=False if a.no_packing else None,
        template=_template(a.template))
    update(1, 1, f'{windows.examples:,} examples')
  with bars.bar(f'begin {a.method}') as update:
    model = begin(model, a.method, adapter or None, a.seed)
    update(1, 1)
  whole = _whole(model, a, bars)
  batch = min(a.batch, len(windows))
  steps = a.steps or finetune.steps_of(windows, batch, a.epochs)
  kept, last = out.with_name(f'.{out.name}.training'), {}
  with bars.bar('train') as update, termination() as stop:
    rates = recipe.rates_of(model.module, model.params, Batches(windows, batch, a.seed),
                            finetune.TUNINGS[a.method].trainable, None, None, steps)
    show = training(update, rates)

    def hook(step, metrics):
      show(step, metrics)
      last.update(step=step, metrics=metrics)
    model = follow(model, windows, method=a.method, steps=steps, batch=batch, peak=a.peak,
                   warmup=a.warmup, seed=a.seed, workdir=kept, hooks=(hook,), stop=stop)
  if whole := whole or _whole(model, a, bars):         # trained apart, parts may fit no file
    lean.save(model, out)
  else:
    lean.save_adapter(model, out)
  shutil.rmtree(kept, ignore_errors=True)
  found = dict(
      out=str(out), format='lean' if whole else 'peft', method=a.method,
      examples=windows.examples, cut=windows.cut, left_out=windows.left_out, rows=len(windows),
      window=windows.length, learned_tokens=windows.learned, steps=steps,
      loss=float(last['metrics']['loss']) if last else None)
  print(json.dumps(found) if a.json else
        '\n'.join(f'{k:<14} {v:,}' if isinstance(v, int) else f'{k:<14} {v}'
                  for k, v in found.items()))


def _whole(model, a, bars):
  """Whether PEFT's files have no words for what is tuned; told, if the method attaches adapters."""
  from lean_jax.adapters.peft import refusal
  from lean_jax.training import finetune
  why = refusal(model.family, model.config, model.params)
  if why is not None and finetune.TUNINGS[a.method].attach is not None:
    bars.line('no file of PEFT', f'{why}; {a.out} will be a whole model')
  return why is not None


def _template(given):
  """The text of a Jinja file, or the name of one of the tokenizer's templates."""
  if given is None or not pathlib.Path(given).is_file():
    return given
  return pathlib.Path(given).read_text(encoding='utf-8')
