"""distill_loss against the plain form, which has all logits in memory: time and temporaries.

python benchmarks/distill_loss.py [--rounds 3] [--width 256] [--size 512x32768 ...]

Prints, of each size (tokens x vocabulary), dtype and kind, milliseconds of the loss and its
gradients (of hidden states and of the student's head), the least over rounds in which both take
turns, MiB of temporaries, and the ratios. A plain form that would take more than half of the
machine's memory is not run; its temporaries are the compiler's either way.
"""
import argparse
import functools
import os
import time

SIZES = ('512x32768', '2048x131072')
KINDS = dict(forward_kl={}, jsd={}, hard_and_soft=dict(temperature=2., soft_weight=.5))


def compiled(T, V, D, dtype, kind, implementation):
  """The compiled loss and gradients, and its arguments' shapes."""
  import jax
  import jax.numpy as jnp

  from lean_jax.kernels.distill_loss.api import distill_loss

  def loss(hs, ws, ht, wt, labels):
    how = dict(KINDS[kind]) if kind == 'hard_and_soft' else dict(kind=kind)
    return distill_loss(hs, ws, ht, wt, labels=labels, implementation=implementation, **how)[0]
  shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((T, D), (D, V), (T, D), (D, V))]
  shapes.append(jax.ShapeDtypeStruct((T,), jnp.int32))
  return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile(), shapes


def operands(shapes, V):
  import jax
  import jax.numpy as jnp
  keys = jax.random.split(jax.random.key(0), len(shapes))
  return [jax.random.randint(k, s.shape, 0, V) if jnp.issubdtype(s.dtype, jnp.integer)
          else jax.random.normal(k, s.shape, s.dtype) * s.shape[0] ** -.5
          for k, s in zip(keys, shapes)]


def measured(runs, args, rounds):
  """{name: seconds}, the least of those in turns."""
  import jax
  best = dict.fromkeys(runs, float('inf'))
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(*args))
      best[name] = min(best[name], time.perf_counter() - start)
  return best


def report(T, V, D, dtype, kind, rounds):
  of = functools.partial(compiled, T, V, D, dtype, kind)
  runs, needs = {}, {}
  for name, implementation in (('fused', None), ('plain', 'reference')):
    runs[name], shapes = of(implementation)
    needs[name] = runs[name].memory_analysis().temp_size_in_bytes
  if needs['plain'] > memory() / 2:
    del runs['plain']
  best = measured(runs, operands(shapes, V), rounds)
  line = f'{T}x{V} {dtype} {kind}: fused {1e3 * best["fused"]:.0f} ms'
  if 'plain' in best:
    line += f', plain {1e3 * best["plain"]:.0f} ms ({best["plain"] / best["fused"]:.2f}x)'
  mib = {name: n / 2 ** 20 for name, n in needs.items()}
  print(f'{line}; temporaries {mib["fused"]:.0f} MiB, plain {mib["plain"]:.0f} MiB '
        f'({mib["plain"] / mib["fused"]:.1f}x)', flush=True)


def memory():
  """Bytes that the device, or this machine, has."""
  import jax
  stats = jax.devices()[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def main():
  """Prints a line for each size, dtype and kind."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--size', nargs='*', default=SIZES)
  parser.add_argument('--kind', nargs='*', default=list(KINDS), choices=list(KINDS))
  args = parser.parse_args()
  import jax
  print(f'{jax.default_backend()}, jax {jax.__version__}, width {args.width}')
  for size in args.size:
    T, V = map(int, size.split('x'))
    for dtype in ('float32', 'bfloat16'):
      for kind in args.kind:
        report(T, V, args.width, dtype, kind, args.rounds)


if __name__ == '__main__':
  main()
