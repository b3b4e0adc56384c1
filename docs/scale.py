"""Writes docs/scale.md: what training steps of large models take of devices, by their compilers.

python docs/scale.py     from the root of a checkout, with the extras aot and aot-gpu; half an hour

Each plan is `lean-jax plan` in a process of its own: nothing here ran on a TPU or a GPU.
"""
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs.page import markdown, versions  # noqa: E402
from lean_jax.plan import gib  # noqa: E402

CONFIG = 'experiments/distill_70b.py'
PLANS = (('70B -> 8B, v5e-256', '', 'v5e:16x16'), ('70B -> 8B, v6e-256', ':v6e', 'v6e:16x16'),
         ('QLoRA of 70B, one H200', ':qlora', 'h200'))
TITLES = ('plan', 'mesh', 'tokens a step:', 'arguments:', 'temporaries:', 'total:', 'of:', 'fits')
INTRODUCTION = '''# Scale

Written by `python docs/scale.py` ({versions}).

The real training step, compiled ahead of time on a CPU by the compiler of the device; parameters
are shapes. Bytes are GiB on one device: arguments are weights, optimizer, teacher and batch; the
total is what the program needs at once. How to run on such machines: [tpu_vm.md](tpu_vm.md).

'''


def main():
  """Runs each plan, and writes the page."""
  found = {}
  for title, size, topology in PLANS:
    done = subprocess.run(
        [sys.executable, '-m', 'lean_jax', 'plan', f'--config={CONFIG}{size}',
         f'--topology={topology}', '--json'], capture_output=True, text=True, cwd=ROOT)
    if done.returncode not in (0, 1) or not done.stdout.strip():
      raise SystemExit(f'{title}: {done.stderr[-2000:]}')
    found[title] = json.loads(done.stdout.splitlines()[-1])
  (ROOT / 'docs' / 'scale.md').write_text(page(found), encoding='utf-8')


def page(found):
  """The text of the page.

  Args:
    found: {title of a plan: what `pipeline.plan.plan` gave}.
  """
  text = INTRODUCTION.format(versions=versions('jax', 'libtpu'))
  text += markdown(TITLES, [row(title, f) for title, f in found.items()])
  text += '''
Products of a step on one device, in TFLOP, as it is traced: with what is computed again (remat),
and before the compiler drops what nobody needs; those of the model alone; and what chips tell each
other: how often a step, and GiB of results on one device.

'''
  kinds = [k for f in found.values() for k in f.get('collectives', {})]
  kinds = list(dict.fromkeys(kinds))
  text += markdown(('plan', 'TFLOP:', 'of the model:', *(f'{k}:' for k in kinds)), [
      (title, f'{f["operations"] / 1e12:,.1f}', f'{f["model_operations"] / 1e12:,.1f}',
       *(cell(f.get('collectives', {}).get(k)) for k in kinds)) for title, f in found.items()])
  text += '''
Whole on every device, although an axis of the mesh would divide them:

'''
  text += markdown(('plan', 'arrays:', 'GiB:', 'the largest'), [
      (title, len(f['replicated']), gib(sum(size for _, size, _ in f['replicated'])),
       f'`{f["replicated"][0][0]}`' if f['replicated'] else '-') for title, f in found.items()])
  return text


def row(title, f):
  """A line of the first table."""
  mesh = ' x '.join(f'{k} {n}' for k, n in f['mesh'].items()) or '-'
  of = lambda key: gib(f[key]) if key in f else '-'
  total = of('total' if 'total' in f else 'used')
  return (title, mesh, f'{f["tokens"]:,}', of('arguments'), of('temporaries'), total,
          gib(f['limit']) if f['limit'] else '-', 'yes' if f['fits'] else 'no')


def cell(found):
  """How often, and GiB, of one kind of collective."""
  return '-' if found is None else f'{found[0]:,} ({gib(found[1])})'


if __name__ == '__main__':
  main()
