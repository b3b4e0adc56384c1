"""What a call of an op's api costs over a call of its kernel by itself, both jitted, on this CPU.

python benchmarks/call_overhead.py [--size 512] [--rows 1] [--rounds 2000]

The two take turns on the same operands; medians. The weight is small, so that it is the call that
counts and not the product; `same` is whether XLA was given the same program but for its names.
"""
import argparse
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.int8_matmul import cpu as int8_cpu
from lean_jax.kernels.native import library
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.kernels.weight_only_matmul import cpu as weight_only_cpu
from lean_jax.quantization import formats
from lean_jax.quantization.packing import pack
from lean_jax.quantization.spec import parse_spec


def pairs(n):
  """{name: (through the api, the kernel, its arrays after the activations)}."""
  w = jnp.asarray(np.random.default_rng(0).normal(size=(n, n)), jnp.float32)
  out = {}
  for scheme in ('w8a8', 'w4a8-g64', 'w4a16-g64', 'nf4-g64'):
    spec = parse_spec(scheme)
    codes, scale, zero = formats.quantize(w, spec)
    group = spec.group or n
    if spec.activation_bits:
      api = lambda x, v, s, z, g=spec.group: int8.int8_matmul(x, v, s, group=g)
      bare = lambda x, v, s, z, g=group: int8_cpu.int8_matmul(x, v, s, g)
    else:
      api = lambda x, v, s, z, p=spec: weight_only.weight_only_matmul(x, v, s, z, p)
      bare = lambda x, v, s, z, p=spec: weight_only_cpu.weight_only_matmul(x, v, s, z, p)
    out[scheme] = jax.jit(api), jax.jit(bare), (pack(codes, spec.bits), scale, zero)
  return out


def program(f, *args):
  """The instructions of a compiled function, in order, without names and places in files."""
  lines = [line for line in f.lower(*args).compile().as_text().splitlines() if ' = ' in line]
  return [re.sub(r'%[\w.-]+|, metadata=.*', '', line) for line in lines]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', type=int, default=512)
  parser.add_argument('--rows', type=int, default=1)
  parser.add_argument('--rounds', type=int, default=2000)
  a = parser.parse_args()
  if library.why_not():
    raise SystemExit(f'the native kernels: {library.why_not()}')
  x = jnp.asarray(np.random.default_rng(1).normal(size=(a.rows, a.size)), jnp.float32)
  print(f'{a.rows} x {a.size} x {a.size}, jax {jax.__version__}; kernels: {library.level()}\n')
  print('| product | api, us | kernel, us | over | same |\n| --- | ---: | ---: | ---: | --- |')
  for name, (*both, arrays) in pairs(a.size).items():
    seen = [], []
    for k in range(a.rounds + 20):
      for f, times in zip(both[::1 if k % 2 else -1], seen[::1 if k % 2 else -1]):
        start = time.perf_counter()
        jax.block_until_ready(f(x, *arrays))
        times.append(time.perf_counter() - start)
    api, bare = (statistics.median(times[20:]) for times in seen)
    same = program(both[0], x, *arrays) == program(both[1], x, *arrays)
    print(f'| {name} | {1e6 * api:.1f} | {1e6 * bare:.1f} | {api / bare - 1:+.1%} | '
          f'{"yes" if same else "no"} |', flush=True)


if __name__ == '__main__':
  main()
