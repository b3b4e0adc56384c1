"""Writes docs/kernels.md: what runs of each op on which platform and why, its proof, its figures.

python docs/kernels.py     from the root of a checkout, with the extra aot; some minutes

What runs is asked of the ops' own Forms. Figures of a TPU are compiled anew; those of other devices
are the newest tables of benchmarks/results.
"""
import collections
import contextlib
import functools
import importlib
import os
import pathlib
import re
import sys
from unittest import mock

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks import kernels_static as static  # noqa: E402
from docs.page import markdown, versions  # noqa: E402
from lean_jax.kernels.attention_decode import api as attention  # noqa: E402
from lean_jax.kernels.distill_loss import api as loss  # noqa: E402
from lean_jax.kernels.fake_quant import api as fake  # noqa: E402
from lean_jax.kernels.platforms import device, schedule  # noqa: E402
from lean_jax.kernels.quantize_rows import api as rows  # noqa: E402
from lean_jax.quantization.rtn import rtn  # noqa: E402
from lean_jax.quantization.spec import parse_spec  # noqa: E402
from lean_jax.weights import Dense  # noqa: E402
from lean_jax.weights.prepared import prepare  # noqa: E402

INTRODUCTION = '''# Kernels

Written by `python docs/kernels.py` ({versions}).

What runs of each op, without an implementation asked for, when weights are laid out for the
platform by `prepare`; `xla` is what the compiler makes of the op's plain form. Nothing here ran on
a TPU or a GPU: their kernels are interpreted and compiled on a CPU, as CONTRIBUTING.md says.

'''
STATIC = '''
## Figures: TPU, by the compiler's schedule

`python benchmarks/kernels_static.py`, which says what they are and are not: cycles without waiting,
those of the call's bytes, the share of the peak, and what is gained over a bfloat16 weight where
decoding waits for memory. Nobody has timed them.

'''
RESULTS = '''
## Figures: {title}

{introduction} [All of it]({link}).

{text}
'''
MEASURED = ('kernels.py', 'generate_lean.py', 'grouped_matmul.py', 'distill_loss.py')
PLATFORMS = {'CPU': ('cpu', 'cpu'), **{f'TPU {n}': ('tpu', n) for n in ('v4', 'v5e', 'v6e', '7x')},
             'NVIDIA H200': ('cuda', 'NVIDIA H200')}
SIZE = 4096                                            # of a weight
of = jax.ShapeDtypeStruct


def matrix(scheme, M, experts=0):
  """The product of M rows with a weight of 4096 x 4096, or with the weights of experts."""
  def run(platform):
    x = of((M, SIZE), jnp.float32 if platform == 'cpu' else jnp.bfloat16)
    w = weight(scheme, experts, x.dtype, dict(cuda='gpu').get(platform, platform))
    if not experts:
      return jax.eval_shape(lambda w, x: w.einsum('md,df->mf', x), w, x)
    return jax.eval_shape(lambda w, x, n: w.grouped(x, n), w, x, of((experts,), jnp.int32))
  return run


@functools.cache
def weight(scheme, experts, dtype, platform):
  """Shapes of a weight, or of experts', laid out for a platform."""
  shape, dims = ((experts, SIZE, SIZE), 'eio') if experts else ((SIZE, SIZE), 'io')
  whole = lambda: Dense(jnp.zeros(shape, dtype), dims, (None,) * len(dims))
  return jax.eval_shape(lambda: prepare(rtn(whole(), scheme), platform) if scheme else whole())


def decoded(bits, paged):
  """Attention of 8 texts, 8 groups of 4 heads, to 4096 tokens."""
  def run(_):
    N, g, S, K = 64, 32, 4096, 128
    q = of((N, 4, K), jnp.bfloat16)

    def codes(n, S, groups):
      return attention.Codes(of((n, S * bits // 8, K), jnp.uint8), of(groups, jnp.float16),
                             of(groups, jnp.float16))

    if not paged:
      k, v = codes(N, S, (N, S // g, K)), codes(N, S, (N, S, 4))
      return jax.eval_shape(lambda *a: attention.attention_decode(*a, bits=bits), q, k, v,
                            of((8, S), bool))
    P, n = 1024, 128
    k, v = codes(P, n, (P, n // g, K)), codes(P, n, (P, n, 4))
    return jax.eval_shape(lambda *a: attention.attention_decode_paged(*a, bits=bits), q, k, v,
                          of((N, S // n), jnp.int32), of((N,), jnp.int32))
  return run


def rounded(_):
  """512 rows in 8 bits."""
  return jax.eval_shape(rows.quantize_rows, of((512, SIZE), jnp.bfloat16))


def distilled(_):
  """8192 tokens, a vocabulary of 32768."""
  h, w = of((8192, 1024), jnp.bfloat16), of((1024, 32768), jnp.bfloat16)
  return jax.eval_shape(loss.distill_loss, h, w, h, w)


def faked(_):
  """A weight rounded in training."""
  return jax.eval_shape(lambda w: fake.fake_quant(w, parse_spec('w4a16-g128')),
                        of((SIZE, SIZE), jnp.float32))


# op -> {operands: the function of a platform that calls it}
CASES = dict(
    int8_matmul={f'{s}, M = {m}': matrix(s, m) for s, m in (
        ('w8a8', 1), ('w8a8', 512), ('w4a8-g128', 1), ('w4a8-g128', 512))},
    weight_only_matmul={f'{s}, M = {m}': matrix(s, m) for s, m in (
        ('w4a16-g128', 1), ('w4a16-g128', 512), ('w2a16-g128', 1), ('w8a16', 1), ('w8a16-g128', 1),
        ('nf4-g64', 1))},
    quantize_rows={'512 rows': rounded},
    grouped_matmul={f'{s or "floats"}, 8 experts, M = {m}': matrix(s, m, 8) for s, m in (
        (None, 512), ('w4a16-g128', 512), ('w8a8', 512))},
    attention_decode={f'{b} bits, {"pages" if p else "a cache"}': decoded(b, p)
                      for b in (8, 4) for p in (False, True)},
    fake_quant={'w4a16-g128': faked},
    distill_loss={'8192 tokens, 32768 in the vocabulary': distilled})


def main():
  """Writes the page."""
  found = status()
  text = INTRODUCTION.format(versions=versions('jax', 'libtpu')) + overview(found)
  for op in CASES:
    text += section(op, found)
  text += STATIC + of_tpus() + ''.join(measured())
  (ROOT / 'docs' / 'kernels.md').write_text(text)


class Asked(Exception):
  """An op's Forms, which it is about to choose from."""


def status():
  """{(op, operands, platform): (the name of what runs, [(name, why not) of what is faster])}."""
  apis = [module for op in CASES if hasattr(
      module := importlib.import_module(f'lean_jax.kernels.{op}.api'), 'chosen')]
  out = {}

  def ended(op, forms, implementation=None):
    raise Asked(forms)

  with contextlib.ExitStack() as patched:
    for module in apis:
      patched.enter_context(mock.patch.object(module, 'chosen', ended))
    for op, cases in CASES.items():
      for what, run in cases.items():
        for name, (platform, kind) in PLATFORMS.items():
          out[op, what, name] = 'xla', []                # of an op with no forms
          try:
            with targeted(platform, kind):
              run(platform)
          except Asked as asked:
            out[op, what, name] = served(asked.args[0], platform)
  return out


def targeted(platform, kind):
  """Inside, programs are for one device of this kind."""
  if platform == 'cpu':
    return contextlib.nullcontext()
  kind = device.full_name(kind.replace('7x', 'tpu7x')) if platform == 'tpu' else kind
  there = jax.sharding.AbstractDevice(kind, 1, dict(cuda='gpu').get(platform, platform))
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=there))


def served(forms, platform):
  """(what runs, why not what is listed before it) of the Forms of a platform."""
  before = []
  for form in forms:
    if platform not in form.platforms:
      continue
    if form.why_not is None:
      return form.name, before
    before.append((form.name, form.why_not))
  raise ValueError(f'nothing of {[f.name for f in forms]} runs on {platform}')


def overview(found):
  """The table of ops and platforms."""
  kinds = ['CPU', 'TPU v5e', 'NVIDIA H200']
  each = lambda op, name: ', '.join(dict.fromkeys(
      f'`{runs}`' for (o, _, p), (runs, _) in found.items() if (o, p) == (op, name)))
  return markdown(['op', *kinds, 'proof'], [
      [f'[{op}](#{op})', *(each(op, name) for name in kinds), ', '.join(proof(op))]
      for op in CASES])


def section(op, found):
  """What runs of an op with which operands, and why nothing faster does."""
  page = importlib.import_module(f'lean_jax.kernels.{op}')
  same, table = collections.defaultdict(list), collections.defaultdict(list)
  for (o, what, name), (runs, before) in found.items():
    if o == op:
      same[what, runs, '; '.join(f'`{n}` {why}' for n, why in before)].append(name)
  for (what, runs, why), names in same.items():         # what has the same outcome is in one row
    table[', '.join(names), runs, why].append(what)
  return f'\n## {op}\n\n{page.__doc__}\n\n' + markdown(
      ['platform', 'operands', 'runs', 'not what is faster where it fits'],
      sorted((names, '; '.join(what), f'`{runs}`', why) for (names, runs, why), what
             in table.items()))


def proof(op):
  """Links to the files of tests that name an op, those that compile it among them."""
  out = []
  for file in sorted((ROOT / 'tests').rglob('test_*.py')):
    if file.parent.name == 'tests':                     # of the package, and of this page
      continue
    text = file.read_text()
    names = rf'kernels\.{op}\b(?!\.reference)'
    if file.parent.name == 'aot':                       # with the scripts that it runs
      text += ''.join((file.parent / name).read_text()
                      for name in re.findall(r'compile_\w+\.py', text))
      names = rf'\b{op}\b'
    if re.search(names, text):
      out.append(f'[{file.parent.name}/{file.name}](../{file.relative_to(ROOT)})')
  return out


def of_tpus():
  """The table of schedules."""
  given = [case | dict(device=d) for d in ('v5e', 'v6e') for case in static.CASES]
  titles = ('op', 'device', 'rows:', 'bits:', 'group:', 'cycles:', 'of memory:', 'share:',
            'gain:', 'spills:')
  return markdown(titles, [
      (r['op'], r['device'], r['m'], r['bits'], r['group'] or '', *static.figures(r))
      for r in schedule.measure(given)])


def measured():
  """Sections of the newest tables of `MEASURED`."""
  for script in MEASURED:
    for file in sorted((ROOT / 'benchmarks' / 'results').glob('*.md'), reverse=True):
      introduction, *parts = re.split(r'^## ', file.read_text(), flags=re.MULTILINE)
      part = next((p for p in parts if f'benchmarks/{script}' in p.splitlines()[0]), None)
      if part:
        title, text = part.split('\n', 1)
        heading, *lines = introduction.strip().splitlines()
        yield RESULTS.format(title=title, text=text.strip(), link=f'../{file.relative_to(ROOT)}',
                             introduction=' '.join([heading.strip('# ') + '.', *lines]).strip())
        break


if __name__ == '__main__':
  main()
