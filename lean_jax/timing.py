"""How long the forms of an op take on this machine, by the clock: `lean-jax tune`.

A form that is slower than another for some operands is one whose `why_not` should say so. There is
nothing else to choose while a program runs: the kernels of CPUs have their sizes compiled in, and
those of GPUs find theirs from the operands.
"""
import json
import statistics
import time

import jax
import jax.numpy as jnp

from lean_jax.kernels.platforms import device
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import QuantSpec
from lean_jax.weights import Dense
from lean_jax.weights.prepared import Prepared, prepare
from lean_jax.weights.product import product

BEYOND = 256 << 20            # bytes of weights, more than a cache has
ROUNDS = 9
FORMS = ('native', 'pallas', 'xla')


def run(requests, as_json, console):
  """Times the forms of each request, dicts as of `tune.shapes`, and prints what it found."""
  rows = [timed(request) for request in requests]
  if as_json:
    print(json.dumps(rows))
    return
  from rich.table import Table
  out = Table(caption=f'{device.kind()}, milliseconds: medians of {ROUNDS}, on weights that no '
              'cache holds')
  for title in ('op', 'bits', 'group', 'm', 'k', 'n', *FORMS, 'runs', 'fastest'):
    out.add_column(title, justify='left' if title in ('op', 'runs', 'fastest') else 'right')
  for r in rows:
    out.add_row(*(str(r[key] or '-') for key in ('op', 'bits', 'group', 'm', 'k', 'n')),
                *(f'{r["ms"][f]:.3f}' if f in r['ms'] else '-' for f in FORMS), r['runs'],
                r['fastest'])
  console().print(out)
  for form, why in dict.fromkeys(item for r in rows for item in r['not'].items()):
    console().print(f'{form}: {why}', markup=False)


def timed(request, rounds=ROUNDS):
  """The request with `ms` of each form that takes it; which one `runs`; and the `fastest`.

  `not` has why the others do not take it.
  """
  x, weights = operands(request)
  programs, why_not = {}, {}
  for name in FORMS:
    program = jax.jit(lambda x, w, name=name: multiplied(x, w, name))
    try:
      jax.eval_shape(program, x, weights[0])
    except ValueError as error:
      why_not[name] = str(error)
      continue
    programs[name] = program
  seen = {name: [] for name in programs}
  for k in range(rounds + 1):                            # the first one compiles
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(program(x, weights[k % len(weights)]))
      seen[name].append(time.perf_counter() - start)
  ms = {name: 1000 * statistics.median(times[1:]) for name, times in seen.items()}
  return request | dict(ms=ms, runs=next(iter(ms)), fastest=min(ms, key=ms.get)) | {'not': why_not}


def operands(request):
  """x [M K] and as many weights, laid out for this platform, as exceed `BEYOND` bytes."""
  platform = device.platform()
  dtype = jnp.float32 if platform == 'cpu' else jnp.bfloat16
  spec = QuantSpec(request['bits'], request['group'],
                   8 if request['op'] == 'int8_matmul' else None)
  x, w = (jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate((
      (request['m'], request['k']), (request['k'], request['n']))))
  w = rtn(Dense(w, 'io', (None, None)), str(spec))
  w = prepare(w, dict(cuda='gpu').get(platform, platform))
  size = sum(a.nbytes for a in jax.tree.leaves(w))
  return x, [w, *(jax.tree.map(jnp.copy, w) for _ in range(max(1, BEYOND // size)))]


def multiplied(x, w, implementation):
  """x @ w by one implementation."""
  rest, layout = (w.rest, w.layout) if isinstance(w, Prepared) else (w, 'packed')
  return product('md,df->mf', x, rest, w.values, layout, implementation)
