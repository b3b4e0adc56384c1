"""What rounding a weight in training costs, over the time that its bytes take on this machine.

python benchmarks/fake_quant.py [--size 4096] [--rounds 7] [--scheme w4a16-g64 ...]

The bound is measured here too: reading a float32 weight once (a sum of it), and writing it once (a
copy less a reading). Forward is two readings, one for the scales, and one writing; of a learned
step one and one. Backward of it is two readings, of the weight and of the gradient that comes, and
one writing; that of the straight-through estimator is nothing (here, a copy). Prints
milliseconds, the least over rounds in which all take turns, their ratio to the bound, and MiB of
temporaries.
"""
import argparse
import time

SCHEMES = ('w4a16-g64', 'w4a16', 'w2a16-g64', 'w1.58a16', 'nf4-g64')


def cases(scheme, size):
  """{what: (function, shapes, readings, writings)} of a weight [size size]."""
  import jax

  from lean_jax.kernels.fake_quant.api import fake_quant, learned_step
  from lean_jax.quantization.spec import parse_spec
  spec, w = parse_spec(scheme), (size, size)
  straight = lambda w: fake_quant(w, spec)
  trained = lambda w, g: (lambda y, pull: (y, pull(g)[0]))(*jax.vjp(straight, w))
  out = {'forward': (straight, [w], 2, 1), 'forward and backward': (trained, [w, w], 3, 2)}
  if spec.code == 'int':
    of = lambda v, step, *offset: learned_step(v, step, offset[0] if offset else None, spec)
    steps = [(-(-size // (spec.group or size)), size)] * (1 if spec.symmetric else 2)
    both = lambda v, g, *s: (lambda y, pull: (y, pull(g)))(*jax.vjp(of, v, *s))
    out |= {'learned, forward': (of, [w, *steps], 1, 1),
            'learned, forward and backward': (both, [w, w, *steps], 3, 2)}
  return out


def compiled(run, shapes):
  """The compiled function and its operands: weights as of a layer, steps a quarter of their size.
  """
  import jax
  import jax.numpy as jnp
  keys = jax.random.split(jax.random.key(0), len(shapes))
  args = [jax.random.normal(k, s) * .02 if s[0] == s[1] else jnp.full(s, .005)
          for k, s in zip(keys, shapes)]
  return jax.jit(run).lower(*args).compile(), args


def measured(runs, rounds):
  """{name: seconds} of {name: (compiled, operands)}, the least of those in turns."""
  import jax
  best = dict.fromkeys(runs, float('inf'))
  for _ in range(rounds):
    for name, (run, args) in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(*args))
      best[name] = min(best[name], time.perf_counter() - start)
  return best


def main():
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--size', type=int, default=4096)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--scheme', nargs='*', default=SCHEMES)
  a = parser.parse_args()
  import jax
  import jax.numpy as jnp
  bound = {'read': (jnp.sum, [(a.size, a.size)]), 'copy': (lambda w: w + 1, [(a.size, a.size)])}
  print(f'{jax.default_backend()}, jax {jax.__version__}, a weight [{a.size} {a.size}]\n')
  print('| scheme | what | ms | bound, ms | ratio | temporaries, MiB |')
  print('| --- | --- | ---: | ---: | ---: | ---: |')
  for scheme in a.scheme:
    found = cases(scheme, a.size)
    runs = {name: compiled(*case[:2]) for name, case in (bound | found).items()}
    best = measured(runs, a.rounds)
    read, write = best['read'], max(best['copy'] - best['read'], 0)
    for name, (*_, readings, writings) in found.items():
      least = readings * read + writings * write
      spare = runs[name][0].memory_analysis().temp_size_in_bytes / 2 ** 20
      print(f'| {scheme} | {name} | {best[name] * 1e3:.1f} | {least * 1e3:.1f} | '
            f'{best[name] / least:.2f} | {spare:.1f} |', flush=True)


if __name__ == '__main__':
  main()
