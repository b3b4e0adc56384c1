"""grouped_matmul against jax.lax.ragged_dot, every expert on every row, and one dense product.

python benchmarks/grouped_matmul.py [--rounds 5]

Prints milliseconds of a forward and of a forward and backward pass, the least over rounds in which
all take turns, and how many times faster ours is. `one matrix` multiplies the same rows by a single
matrix: what no grouped product can be faster than by much. `4 bits` and `8 bits` are ours of
experts in w4a16-g64 and w8a8, laid out by `prepare`: forward alone.
"""
import argparse
import functools
import time

# rows (tokens times experts a token), experts, inputs, outputs
SIZES = dict(
    train=(4096, 8, 512, 1024), many_experts=(8192, 64, 512, 256), prefill=(256, 64, 512, 256),
    decode=(2, 8, 1024, 2048), decode_batch=(64, 64, 512, 256))


def forms():
  """{name: product of x [M I], w [E I O], sizes [E]}."""
  import jax
  import jax.numpy as jnp

  from lean_jax.kernels.grouped_matmul import api

  def every(x, w, sizes):
    rows = jnp.repeat(jnp.arange(w.shape[0]), sizes, total_repeat_length=x.shape[0])
    y = jnp.einsum('mi,eio->meo', x, w)
    return jnp.take_along_axis(y, rows[:, None, None], axis=1)[:, 0]
  return {'ours': api.grouped_matmul, 'ragged_dot': jax.lax.ragged_dot, 'every expert': every,
          'one matrix': lambda x, w, sizes: x @ w[0]}


def measured(size, rounds):
  """{(pass, form): seconds}."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lean_jax.quantization.rtn import rtn
  from lean_jax.weights import Dense
  from lean_jax.weights.prepared import prepare
  M, E, I, O = size
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((M, I), (E, I, O)))
  sizes = jnp.asarray(np.bincount(rng.integers(0, E, M), minlength=E), jnp.int32)
  runs = {}
  for name, form in forms().items():
    runs['forward', name] = functools.partial(jax.jit(form), x, w, sizes)
    if M > E:                                         # decoding has no backward pass
      runs['training', name] = functools.partial(jax.jit(jax.grad(
          lambda x, w, sizes, form=form: jnp.sum(form(x, w, sizes) ** 2), (0, 1))), x, w, sizes)
  grouped = jax.jit(lambda w, x, sizes: w.grouped(x, sizes))
  for name, scheme in (('4 bits', 'w4a16-g64'), ('8 bits', 'w8a8')):
    given = prepare(rtn(Dense(w, 'eio', (None,) * 3), scheme), jax.default_backend())
    runs['forward', name] = functools.partial(grouped, given, x, sizes)
  best = dict.fromkeys(runs, float('inf'))
  for _ in range(rounds):
    for key, run in runs.items():
      for _ in range(3):                              # the first of a turn finds others' caches
        start = time.perf_counter()
        jax.block_until_ready(run())
        best[key] = min(best[key], time.perf_counter() - start)
  return best


def main():
  """Prints a line for each size and pass."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=5)
  rounds = parser.parse_args().rounds
  import jax
  print(f'{jax.default_backend()}, jax {jax.__version__}; milliseconds, and times ours is faster')
  for name, size in SIZES.items():
    best = measured(size, rounds)
    for which in dict.fromkeys(p for p, _ in best):
      ours = best[which, 'ours']
      others = '; '.join(f'{form} {1e3 * t:.2f} ({t / ours:.2f}x)' for (p, form), t in best.items()
                         if p == which and form != 'ours')
      print(f'{name} {size} {which}: ours {1e3 * ours:.2f}; {others}', flush=True)


if __name__ == '__main__':
  main()
