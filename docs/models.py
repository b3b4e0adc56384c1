"""Writes docs/models.md: runs every check of every family, and prints what it measured.

python docs/models.py      from the root of a checkout, with torch and the extra interop; minutes
"""
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.xla import quick  # noqa: E402

quick(1)

import jax  # noqa: E402

from docs.page import markdown, versions  # noqa: E402
from lean_jax.models.families import FAMILIES  # noqa: E402
from tests.interop.parity import CHECKS  # noqa: E402
from tests.interop.rows import ROWS  # noqa: E402
from tests.models import methods_matrix as matrix  # noqa: E402

INTRODUCTION = '''# Models

Written by `python docs/models.py`, from the checks that the tests run ({versions}).

A row is a tiny model of `transformers` with random weights, saved by it and loaded by `lean.load`.
**logits** is the largest difference of float32 logits, of whole rows and of rows padded on either
side, in parts of the largest logit; **cache**, that of the cached path to the whole; **generate**,
whether 32 greedy tokens are the same; **save**, whether `transformers` loads what
`lean.save(..., format='hf')` wrote and computes the very same logits; **bfloat16**, how far it
is from float32, at most twice as far as `transformers` is; **unrolled**, the difference made by
`scan_layers=False`. Other names are checks of encoders and encoder-decoders, in `tests/interop`.
'''
METHODS = '''
## Methods

Each family of `tests/models/configs`, random weights, with each method, the same lines for all of
them: how far the outputs moved, in parts of their root mean square; for `distill`, how much four
steps changed the loss. LoRA and QAT are trained for four steps too, and pass if the loss falls;
LoRA begins as no change at all.
'''


def main():
  """Runs the checks; the exit code is 1 if one fails."""
  failed, rows = [], []
  for row in ROWS:
    cells = [outcome(check, row, failed, row.id) for check in row.checks or CHECKS.values()]
    rows.append((row.family, row.what, row.model, ', '.join(
        f'{name} {cell}' for name, cell in cells)))
    print(*rows[-1], sep=' | ', flush=True)
    jax.clear_caches()                       # as tests/conftest.py does, and why
  methods = [*matrix.STEPS, 'distill']
  table = []
  for family in matrix.CONFIGS:
    cells = [outcome(lambda f, m=m: matrix.check_distill(f) if m == 'distill' else
                     matrix.check_method(f, m), family, failed, f'{family} {m}') for m in methods]
    table.append((family, *(cell for _, cell in cells)))
    print(*table[-1], sep=' | ', flush=True)
    jax.clear_caches()
  text = INTRODUCTION.format(versions=versions('jax', 'flax', 'torch', 'transformers')) + '\n'
  text += markdown(('family', 'row', 'class', 'checks'), rows)
  text += METHODS + '\n' + markdown(('family', *methods), table)
  (ROOT / 'docs' / 'models.md').write_text(text)
  missing = set(FAMILIES) - {row.family for row in ROWS} - {'lean_lstm'}
  print(*failed, *(f'{name}: no row' for name in missing), sep='\n')
  return 1 if failed or missing else 0


def outcome(check, subject, failed, name):
  """(the check's name, what it measured, or that it failed)."""
  title = check.__name__.removeprefix('check_')
  try:
    value = check(subject)
  except Exception as error:  # whatever a model raises belongs in the table
    failed.append(f'{name} {title}: {error}')
    return title, '**fails**'
  return title, 'same' if value is None else f'{value:.1e}' if abs(value) < .01 else f'{value:.2f}'


if __name__ == '__main__':
  sys.exit(main())
