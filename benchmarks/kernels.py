"""Products with weights of few bits on this CPU, against XLA's float32 and other libraries' bits.

taskset -c 0 python benchmarks/kernels.py [--size 4096] [--rows 1 32 512] [--rounds 15]

Each round runs every form once, in turns, on weights that no cache holds any more: as many copies
of each as exceed 256 MiB. Medians; GOP/s of a second of the processor, all threads together.
`times` is against XLA's float32. torch, ONNX Runtime (and onnx) and ggml (xllamacpp) are in the
table where they are installed. On several threads each library's own wait for work for a while
after theirs, and take the time of whoever is next: on one (taskset) they do not.
"""
import argparse
import itertools
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import peers

from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.native import library
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.spec import parse_spec

SCHEMES = ('w8a8', 'w4a8-g64', 'w8a16', 'w4a16-g64', 'nf4-g64', 'w2a16-g64')
NAMES = dict(panels='prepared', packed='as saved')
BEYOND = 256 << 20            # bytes, more than a cache has


def operands(scheme, w, layout):
  """(the jitted product, its arrays after the activations)."""
  spec = parse_spec(scheme)
  codes, scale, zero = formats.quantize(w, spec)
  values, how = layouts.arranged(codes, spec, layout), dict(layout=layout)
  if spec.activation_bits:
    return (jax.jit(lambda x, v, s: int8.int8_matmul(x, v, s, group=spec.group, **how)),
            (values, scale))
  return (jax.jit(lambda x, v, s, z: weight_only.weight_only_matmul(x, v, s, z, spec, **how)),
          (values, scale, zero))


def copies(arrays):
  """As many as no cache holds."""
  size = sum(a.nbytes for a in jax.tree.leaves(arrays))
  again = lambda a: a + jnp.zeros((), a.dtype)
  return [jax.tree.map(again, arrays) for _ in range(max(2, BEYOND // size + 1))]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=4096)
  parser.add_argument('--rows', type=int, nargs='+', default=[1, 32, 512])
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)),
                      help='of the other libraries (as many as processors)')
  parser.add_argument('--layouts', nargs='+', choices=NAMES, default=list(NAMES))
  a = parser.parse_args()
  n, rng = a.size, np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(n, n)) / n ** .5, jnp.float32)
  print(f'{n} x {n}, jax {jax.__version__}; kernels: '
        f'{library.why_not() or library.level()}\n')
  print('| rows | product | ms | times | GOP/s |\n| ---: | --- | ---: | ---: | ---: |')
  forms = {'XLA float32': (jax.jit(lambda x, w: x @ w), copies((w,)))}
  for layout, scheme in itertools.product(a.layouts, SCHEMES):
    product, arrays = operands(scheme, w, layout)
    forms[f'{scheme}, {NAMES[layout]}'] = product, copies(arrays)
  others = {}
  for peer in (peers.torch, peers.onnx, peers.ggml):
    others |= peer(np.asarray(w), BEYOND // (w.size // 2) + 1, a.threads)
  for rows in a.rows:
    x = jnp.asarray(rng.normal(size=(rows, n)), jnp.float32)
    calls = {name: [lambda f=f, c=c, x=x: jax.block_until_ready(f(x, *c)) for c in each]
             for name, (f, each) in forms.items()}
    given = np.array(x)
    calls |= {name: [lambda f=f, given=given: f(given) for f in each]
              for name, each in others.items()}
    seen = {name: [] for name in calls}
    for k in range(a.rounds + 1):
      for name, each in calls.items():
        start, cpu = time.perf_counter(), time.process_time()
        each[k % len(each)]()
        seen[name].append((time.perf_counter() - start, time.process_time() - cpu))
    middle = {name: [statistics.median(s[i] for s in each[1:]) for i in (0, 1)]
              for name, each in seen.items()}
    for name, (clock, cpu) in middle.items():
      print(f'| {rows} | {name} | {1000 * clock:.2f} | {middle["XLA float32"][0] / clock:.2f} | '
            f'{2 * rows * n * n / cpu / 1e9:.0f} |', flush=True)


if __name__ == '__main__':
  main()
