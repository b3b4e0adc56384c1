"""Writes docs/scale.md: what training steps of large models take of devices, by their compilers.

python docs/scale.py [TOPOLOGY ...]     from the root of a checkout, with the extras aot and aot-gpu

Half an hour for all; of some alone, the other rows of the page stay. Each plan is `lean-jax plan`
in a process of its own: nothing here ran on a TPU or a GPU.
"""
import argparse
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
WORDS = ('', '''
Products of a step on one device, in TFLOP, as it is traced: with what is computed again (remat),
and before the compiler drops what nobody needs; those of the model alone; and what chips tell each
other: how often a step, and GiB of results on one device.

''', '''
Whole on every device, although an axis of the mesh would divide them:

''')


def main():
  """Runs each plan, and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  known = [topology for *_, topology in PLANS]
  parser.add_argument('topologies', nargs='*', metavar='TOPOLOGY', help=', '.join(known))
  wanted = parser.parse_args().topologies or known
  if unknown := set(wanted) - set(known):
    parser.error(f'no plan for {", ".join(sorted(unknown))}; there are: {", ".join(known)}')
  found = {}
  for title, size, topology in PLANS:
    if topology not in wanted:
      continue
    done = subprocess.run(
        [sys.executable, '-m', 'lean_jax', 'plan', f'--config={CONFIG}{size}',
         f'--topology={topology}', '--json'], capture_output=True, text=True, cwd=ROOT)
    if done.returncode not in (0, 1) or not done.stdout.strip():
      raise SystemExit(f'{title}: {done.stderr[-2000:]}')
    found[title] = json.loads(done.stdout.splitlines()[-1])
  path = ROOT / 'docs' / 'scale.md'
  path.write_text(page(found, path.read_text(encoding='utf-8')), encoding='utf-8')


def page(found, before=''):
  """The text of the page.

  Args:
    found: {title of a plan: what `pipeline.plan.plan` gave}.
    before: the page whose rows stay for the plans that are not in found.
  """
  kinds = list(dict.fromkeys(k for f in found.values() for k in f.get('collectives', {})))
  fresh = [
      (TITLES, {title: row(title, f) for title, f in found.items()}),
      (('plan', 'TFLOP:', 'of the model:', *(f'{k}:' for k in kinds)),
       {title: talk(title, f, kinds) for title, f in found.items()}),
      (('plan', 'arrays:', 'GiB:', 'the largest'),
       {title: whole(title, f['replicated']) for title, f in found.items()})]
  stays = tables(before) or [((), {})] * len(fresh)
  text = INTRODUCTION.format(versions=versions('jax', 'libtpu'))
  for words, old, new in zip(WORDS, stays, fresh, strict=True):
    text += words + merged(old, new)
  return text


def tables(text):
  """The tables of a page: (titles, {first cell: cells}) of each."""
  found = []
  for block in text.split('\n\n'):
    if block.startswith('| '):
      head, rule, *rows = ([c.strip() for c in line.strip('|').split('|')]
                           for line in block.splitlines())
      titles = [t + ':' * r.endswith(':') for t, r in zip(head, rule)]
      found.append((titles, {cells[0]: cells for cells in rows}))
  return found


def merged(old, new):
  """One table of two: of the columns of both, with the rows of the second where both have one."""
  titles = list(dict.fromkeys([*old[0], *new[0]]))
  rows = {title: dict(zip(of, cells)) for of, each in (old, new) for title, cells in each.items()}
  return markdown(titles, [[rows[title].get(t, '-') for t in titles]
                           for title, *_ in PLANS if title in rows])


def row(title, f):
  """A line of the first table."""
  mesh = ' x '.join(f'{k} {n}' for k, n in f['mesh'].items()) or '-'
  of = lambda key: gib(f[key]) if key in f else '-'
  total = of('total' if 'total' in f else 'used')
  return (title, mesh, f'{f["tokens"]:,}', of('arguments'), of('temporaries'), total,
          gib(f['limit']) if f['limit'] else '-', 'yes' if f['fits'] else 'no')


def talk(title, f, kinds):
  """A line of the second table."""
  return (title, *(f'{f[key] / 1e12:,.1f}' for key in ('operations', 'model_operations')),
          *(cell(f.get('collectives', {}).get(k)) for k in kinds))


def whole(title, arrays):
  """A line of the third table."""
  return (title, len(arrays), gib(sum(size for _, size, _ in arrays)),
          f'`{arrays[0][0]}`' if arrays else '-')


def cell(found):
  """How often, and GiB, of one kind of collective."""
  return '-' if found is None else f'{found[0]:,} ({gib(found[1])})'


if __name__ == '__main__':
  main()
