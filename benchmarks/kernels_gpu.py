"""The ops on an NVIDIA H100 or H200: time, against XLA's forms, and as a share of the roofline.

python benchmarks/kernels_gpu.py [--only int8_matmul weight_only_matmul ...] [--rounds 20]

Each call runs a form on as many copies of its operands, one after the other, as no cache holds;
forms take turns, and the median counts. `bf16` and `int8` are how many times faster a form is than
XLA's fastest one of those operands; `share` is the time that the device's peaks allow, of
operations or of bytes, as a part of the form's. `bar` is what is asked of the form in bold.
"""
import argparse
import functools
import math
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.kernels.attention_decode.api import attention_decode
from lean_jax.kernels.attention_decode.codes import Codes
from lean_jax.kernels.distill_loss.api import distill_loss
from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.weight_only_matmul.api import weight_only_matmul
from lean_jax.nn import rounded
from lean_jax.quantization.spec import parse_spec

BEYOND = 256 << 20            # bytes, more than the cache has
# Bytes, bfloat16 and int8 operations a second.
PEAKS = {'NVIDIA H100': (3.35e12, 989e12, 1979e12), 'NVIDIA H200': (4.8e12, 989e12, 1979e12)}


class Run(NamedTuple):
  """One form of a case.

  Attributes:
    name: of the form; ours is 'op'.
    kind: 'bf16' or 'int8' of a form of XLA, '' of others.
    f: a function of the arrays.
    arrays: a function without arguments that makes them.
    operations, bytes: of a call.
    peak: 'bf16' or 'int8', of its operations.
  """
  name: str
  kind: str
  f: Any
  arrays: Any
  operations: float
  bytes: float
  peak: str


def normal(seed, shape, dtype=jnp.bfloat16, scale=1.):
  draw = jax.jit(lambda: (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype))
  return draw()


def codes(seed, shape, dtype=jnp.int8):
  return jax.random.bits(jax.random.key(seed), shape, jnp.uint8).astype(dtype)


def int8_matmul(size):
  """From bfloat16 to bfloat16, the activations rounded on the way."""
  def ours(implementation, x, v, s):
    return int8.int8_matmul(x, v, s, layout='columns', dtype=jnp.bfloat16,
                            implementation=implementation)
  x, n = functools.partial(normal, 0, (size, size)), size * size
  quantized = lambda: (x(), codes(1, (size, size)), jnp.full((1, size), .01, jnp.float32))
  of = functools.partial(Run, operations=2. * size ** 3)
  return [of('op', '', functools.partial(ours, None), quantized, bytes=5 * n, peak='int8'),
          of('XLA int8', 'int8', functools.partial(ours, 'xla'), quantized, bytes=5 * n,
             peak='int8'),
          of('XLA bf16', 'bf16', jnp.matmul, lambda: (x(), normal(1, (size, size))), bytes=6 * n,
             peak='bf16')]


def weight_only(K, N, M=1, scheme='w4a16-g128'):
  spec = parse_spec(scheme)
  def ours(implementation, x, v, s):
    return weight_only_matmul(x, v, s, None, spec, layout='columns', implementation=implementation)
  x, G = functools.partial(normal, 0, (M, K)), K // spec.group
  packed = lambda: (x(), codes(1, (N, K * spec.bits // 8), jnp.uint8),
                    normal(2, (G, N), scale=.01))
  whole = lambda: (x(), codes(1, (N, K)), jnp.full((1, N), .01, jnp.float32))
  few = K * N * spec.bits // 8 + 2 * G * N
  of = functools.partial(Run, operations=2. * M * K * N, peak='bf16')
  return [of('op', '', functools.partial(ours, None), packed, bytes=few),
          of('XLA, the same weights', '', functools.partial(ours, 'xla'), packed, bytes=few),
          of('XLA int8', 'int8', lambda x, v, s: (x @ v.T.astype(x.dtype)) * s.astype(x.dtype),
             whole, bytes=K * N),
          of('XLA bf16', 'bf16', jnp.matmul, lambda: (x(), normal(1, (K, N))), bytes=2 * K * N)]


def loss(T, V, D):
  """The loss and its gradients; the plain form has all logits in memory."""
  def run(implementation, hs, ws, ht, wt):
    return jax.value_and_grad(lambda hs, ws: distill_loss(
        hs, ws, ht, wt, implementation=implementation)[0], (0, 1))(hs, ws)

  def plain(hs, ws, ht, wt):
    def mean(hs, ws):
      p = jax.nn.log_softmax((ht @ wt).astype(jnp.float32))
      q = jax.nn.log_softmax((hs @ ws).astype(jnp.float32))
      return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    return jax.value_and_grad(mean, (0, 1))(hs, ws)
  arrays = lambda: tuple(normal(k, s, scale=D ** -.5) for k, s in enumerate(((T, D), (D, V)) * 2))
  of = functools.partial(Run, arrays=arrays, operations=8. * T * D * V, peak='bf16',
                         bytes=2 * (3 * T * D + 3 * D * V))
  return [of('op', '', functools.partial(run, None)), of('XLA bf16', 'bf16', plain)]


def attention(S, rows=128, R=4, K=128, g=32):
  """Keys and values of `rows` (texts x heads) of S tokens in 8 bits, of grids as a cache has."""
  visible = jnp.ones((1, S), bool)
  q = functools.partial(normal, 0, (rows, R, K))
  half, C = lambda shape: jnp.full(shape, .01, jnp.float16), K // rounded.shared(K)

  def quantized():
    grid = lambda shape: (half(shape), half(shape))
    return q(), *(Codes(codes(k, (rows, S, K), jnp.uint8), *grid(shape))
                  for k, shape in enumerate(((rows, S // g, K), (rows, S, C)), 1))

  def plain(q, k, v):
    scores = jnp.einsum('nrk,nsk->nrs', q, k, preferred_element_type=jnp.float32) * K ** -.5
    return jnp.einsum('nrs,nsk->nrk', jax.nn.softmax(scores).astype(q.dtype), v)
  of, n = functools.partial(Run, operations=4. * rows * R * S * K, peak='bf16'), rows * S * K
  floats = lambda: (q(), normal(1, (rows, S, K)), normal(2, (rows, S, K)))
  return [of('op', '', lambda q, k, v: attention_decode(q, k, v, visible, bits=8), quantized,
             bytes=2 * n + 4 * (n // g + rows * S * C)),
          of('XLA bf16', 'bf16', plain, floats, bytes=4 * n)]


# Op: [(what, forms of it, what is asked)].
CASES = dict(
    int8_matmul=[(f'{n}^3', functools.partial(int8_matmul, n), 'bf16 >= 1.6')
                 for n in (4096, 8192)],
    weight_only_matmul=[(f'W4 g128, 1 x {K} x {N}', functools.partial(weight_only, K, N),
                         'bf16 >= 3, share >= 80%') for K, N in ((4096, 4096), (8192, 28672))],
    distill_loss=[('32k x 128k, D 4096', functools.partial(loss, 32768, 131072, 4096),
                   'bf16 >= 0.77, temporaries < 5%')],
    attention_decode=[('int8, 32k tokens x 128', functools.partial(attention, 32768),
                       'bf16 >= 1.7')])


def prepared(run):
  """(the compiled form on copies of its arrays, the copies, how many, MiB of temporaries)."""
  first = run.arrays()
  size = sum(a.nbytes for a in jax.tree.leaves(first))
  count = min(64, max(1, math.ceil(BEYOND / size)))
  again = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
  each = [first] + [again(first) for _ in range(count - 1)]
  many = jax.jit(lambda each: [run.f(*arrays) for arrays in each]).lower(each).compile()
  return many, each, count, many.memory_analysis().temp_size_in_bytes / 2 ** 20


def measured(runs, rounds):
  """{name: (seconds of a call, MiB of temporaries)}, or an error's first line."""
  ready, found = {}, {}
  for run in runs:
    try:
      ready[run.name] = prepared(run)
      jax.block_until_ready(ready[run.name][0](ready[run.name][1]))
    except jax.errors.JaxRuntimeError as error:            # out of memory, as the plain loss may be
      ready.pop(run.name, None)
      found[run.name] = str(error).splitlines()[0][:60]
  seen = {name: [] for name in ready}
  for _ in range(rounds):
    for name, (many, each, count, _) in ready.items():
      start = time.perf_counter()
      jax.block_until_ready(many(each))
      seen[name].append((time.perf_counter() - start) / count)
  return found | {name: (statistics.median(times), ready[name][3]) for name, times in seen.items()}


def rows(op, what, runs, bar, rounds, peaks):
  """The lines of a case."""
  width, *speeds = peaks
  speed = dict(zip(('bf16', 'int8'), speeds))
  found = measured(runs, rounds)
  best = {kind: min((found[r.name][0] for r in runs
                     if r.kind == kind and not isinstance(found[r.name], str)), default=None)
          for kind in speed}
  for run in runs:
    name = '**op**' if run.name == 'op' else run.name
    if isinstance(found[run.name], str):
      yield f'| {op} | {what} | {name} | {found[run.name]} | | | | | |'
      continue
    seconds, temporaries = found[run.name]
    least = max(run.bytes / width, run.operations / speed[run.peak])
    times = [f'{best[kind] / seconds:.2f}' if best[kind] else '' for kind in speed]
    yield (f'| {op} | {what} | {name} | {1e6 * seconds:.1f} | {times[0]} | {times[1]} | '
           f'{least / seconds:.0%} | {temporaries:.0f} | {bar if run.name == "op" else ""} |')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', nargs='+', choices=CASES, default=list(CASES))
  parser.add_argument('--rounds', type=int, default=20)
  a = parser.parse_args()
  kind = jax.devices()[0].device_kind
  peaks = next((p for name, p in PEAKS.items() if kind.startswith(name)), None)
  if jax.default_backend() != 'gpu' or peaks is None:
    parser.error(f'needs an {" or ".join(PEAKS)}, and JAX finds {kind!r} '
                 '(pip install "jax[cuda13]", and JAX_PLATFORMS unset)')
  print(f'{kind}, jax {jax.__version__}\n')
  print('| op | of | form | us | bf16 | int8 | share | MiB of temporaries | bar |\n'
        '| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |')
  for op in a.only:
    for what, runs, bar in CASES[op]:
      for line in rows(op, what, runs(), bar, a.rounds, peaks):
        print(line, flush=True)


if __name__ == '__main__':
  main()
