"""Writes docs/quantization.md: formats, methods and families, and what each was measured to cost.

LEAN_JAX_DATA=DIR python docs/quantization.py     from the root of a checkout; half an hour

The real model and text are stories260K and TinyStories in that folder, as its README has them.
"""
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.xla import quick  # noqa: E402

quick(1)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import lean_jax as lean  # noqa: E402
from docs.page import markdown, versions  # noqa: E402
from lean_jax import methods, tree  # noqa: E402
from lean_jax.calibration.driver import calibrated  # noqa: E402
from lean_jax.data import sources  # noqa: E402
from lean_jax.data.windows import pack  # noqa: E402
from lean_jax.errors import InputError  # noqa: E402
from lean_jax.quantization.rtn import rtn  # noqa: E402
from lean_jax.quantization.spec import KNOWN, parse_spec  # noqa: E402
from lean_jax.weights import Dense, Quantized  # noqa: E402
from tests.models import methods_matrix as matrix  # noqa: E402

INTRODUCTION = '''# Quantization

Written by `python docs/quantization.py` ({versions}).

## Formats

Each scheme rounded to nearest, of a matrix [1024, 256] of normal numbers: bits a parameter as
stored, scales and zero points included, and the error of the values, in parts of their root mean
square.

'''
REAL = '''
## Methods and formats

Perplexity of stories260K (260,032 parameters, {perplexity:.3f} in float32), its matrices rounded,
on {texts} of TinyStories that were not seen, calibrated on {samples} windows of {window} tokens of
others. Its widths are 64 and 172, and groups of 32 leave a shorter one. `mse` is `rtn` with
clip='mse'; `gptq` has clip='mse' too. A method that a scheme does not go with has no figure.

'''
FAMILIES = '''
## Methods and families

Each family of `tests/models/configs`, random weights, rounded on 32 random tokens by the same
lines: how far the outputs moved, in parts of their root mean square. Every matrix of every layer
was rounded, the experts' too, or the row says `fails`.

'''
SCHEMES = ('w8a16', 'w8a8', 'w8a8-static', 'w4a16', 'w4a16-g32', 'w4a16-g32-asym', 'w4a8-g32',
           'w3a16-g32', 'w2a16-g32', 'nf4-g32', 'nf4-g32-dq', 'fp4-g32', 'fp8', 'mxfp4',
           'w1.58a16')
METHODS = dict(rtn=('rtn', {}), mse=('rtn', dict(clip='mse')), hqq=('hqq', {}), awq=('awq', {}),
               gptq=('gptq', dict(clip='mse')), smoothquant=('smoothquant', {}))
CELLS = dict([('rtn w8a8', ('rtn', 'w8a8')), ('rtn nf4-g16-dq', ('rtn', 'nf4-g16-dq')),
              ('hqq w4a16-g16-asym', ('hqq', 'w4a16-g16-asym')),
              ('awq w4a16-g16', ('awq', 'w4a16-g16')), ('gptq w4a16-g16', ('gptq', 'w4a16-g16')),
              ('smoothquant w8a8', ('smoothquant', 'w8a8'))])
WINDOW, SAMPLES = 256, 32


def main():
  """Writes the page; the exit code is 1 if a family fails."""
  data = os.environ.get('LEAN_JAX_DATA')
  if not data:
    raise SystemExit('LEAN_JAX_DATA names no folder of real data')
  text = INTRODUCTION.format(versions=versions('jax', 'flax')) + formats()
  text += real(pathlib.Path(data))
  table, failed = families()
  pathlib.Path(ROOT, 'docs', 'quantization.md').write_text(text + table)
  return 1 if failed else 0


def formats():
  """The table of the schemes."""
  values = jax.random.normal(jax.random.key(0), (1024, 256))
  rows = []
  for name in KNOWN:
    if parse_spec(name).static:
      continue
    w = rtn(Dense(values, 'io', (None, None)), name)
    error = jnp.sqrt(jnp.mean((w.unbox() - values) ** 2) / jnp.mean(values ** 2))
    rows.append((f'`{name}`', f'{8 * tree.nbytes(w) / values.size:.3f}', f'{float(error):.4f}'))
  return markdown(('scheme', 'bits:', 'error:'), rows)


def real(data):
  """The table of schemes and methods on a real model."""
  model = lean.load(data / 'models' / 'stories260K')
  source = sources.open_source(str(data / 'tinystories' / 'stories.jsonl'))
  cache = tempfile.mkdtemp()
  given = [pack(source, split, model.tokenizer, WINDOW, cache, max_tokens=most)
           for split, most in (('train', SAMPLES * WINDOW), ('test', 40_000))]
  perplexity = lambda m: lean.evaluate(m, given[1], window=WINDOW)['perplexity']
  rows = []
  for scheme in SCHEMES:
    cells, bits = [], None
    for method, settings in METHODS.values():
      try:
        report = []
        small = lean.quantize(model, scheme, method, calibration=given[0], samples=SAMPLES,
                              report=report, **settings)
        cells.append(f'{perplexity(small):.3f}')
        bits = bits or 8 * sum(r['bytes'] for r in report) / sum(r['parameters'] for r in report)
      except InputError as error:
        print(scheme, method, error, sep=': ', flush=True)
        cells.append('')
    rows.append((f'`{scheme}`', f'{bits:.2f}', *cells))
    print(*rows[-1], sep=' | ', flush=True)
    jax.clear_caches()
  return REAL.format(perplexity=perplexity(model), texts=f'{given[1].tokens:,} tokens',
                     samples=SAMPLES, window=WINDOW) + markdown(
                         ('scheme', 'bits:', *(f'{name}:' for name in METHODS)), rows)


def families():
  """The table of families, and whether one fails."""
  rows, failed = [], False
  for name in matrix.CONFIGS:
    cells = []
    for method, spec in CELLS.values():
      try:
        cells.append(f'{moved(name, method, spec):.3f}')
      except (InputError, AssertionError) as error:
        print(name, method, error, sep=': ', flush=True)
        cells.append('fails')
        failed = True
    rows.append((name, *cells))
    print(*rows[-1], sep=' | ', flush=True)
    jax.clear_caches()
  return FAMILIES + markdown(('family', *(f'{name}:' for name in CELLS)), rows), failed


def moved(name, method, spec):
  """How far a family's outputs move, in parts of their root mean square."""
  config, params = matrix.model(name)
  batch = matrix.batch(config)
  rule = methods.bound(method, dict(spec=spec))
  out, _ = calibrated(config, params, [(matrix.MATRICES, rule)], [batch])
  kept = [n for n, w in tree.named_weights(out).items()
          if 'layers/' in n and not isinstance(getattr(w, 'base', w), Quantized)]
  assert not kept, f'left in float: {kept}'
  before, after = matrix.outputs(name), matrix.computed(config.module, out, batch)
  assert np.isfinite(after).all(), 'outputs that are not finite'
  return float(np.sqrt(np.mean((after - before) ** 2) / np.mean(before ** 2)))


if __name__ == '__main__':
  sys.exit(main())
