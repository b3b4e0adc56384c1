"""A training step through the rounding against the float model's, taking turns in one process.

python benchmarks/quantize_training.py [--size small|large] [--rounds 15]

A step is the gradient of the next token's loss and AdamW's update, one compiled program. Prints of
each method and scheme the medians over rounds, in seconds of wall time and of CPU time (all
threads), and their ratio to the float step's, round by round. Ends with exit code 1 where the wall
time of a step is more than 1.25 times the float one's.
"""
import argparse
import os
import statistics
import sys
import time

SIZES = dict(
    small=dict(vocabulary=512, width=128, layers=4, heads=4, groups=2, head_width=32, hidden=384,
               context=128, batch=16),
    large=dict(vocabulary=4096, width=256, layers=4, heads=4, groups=2, head_width=64, hidden=768,
               context=256, batch=16))
CASES = (('fake_quantize', 'w8a8'), ('fake_quantize', 'w4a16-g64'), ('fake_quantize', 'w2a16-g64'),
         ('fake_quantize', 'w1.58a8'), ('lsq', 'w4a16'), ('lsq_plus', 'w2a16'))
BOUND = 1.25


def step_of(module, params, tokens):
  """A function that runs one training step and waits for it."""
  import jax
  import optax

  from lean_jax.objectives.language_modeling import next_token
  from lean_jax.training.optimizer import adamw
  loss, tx = next_token(module), adamw(steps=10 ** 6, peak=1e-3, weight_decay=.1, clip=1.)

  @jax.jit
  def update(params, opt):
    grads, _ = jax.grad(loss, has_aux=True)(params, dict(tokens=tokens), None)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt
  state = [params, jax.jit(tx.init)(params)]

  def step():
    state[:] = jax.block_until_ready(update(*state))
  return step


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=SIZES, default='small')
  parser.add_argument('--rounds', type=int, default=15)
  arguments = parser.parse_args()
  import jax
  import numpy as np

  from lean_jax import methods
  from lean_jax.models.decoder import Decoder, DecoderConfig
  size = SIZES[arguments.size]
  module = Decoder(DecoderConfig(**{k: v for k, v in size.items() if k != 'batch'}))
  tokens = np.random.default_rng(0).integers(
      0, size['vocabulary'], (size['batch'], size['context'])).astype(np.int32)
  plain = jax.jit(module.init)(jax.random.key(0), tokens[:1, :8])['params']
  lean = lambda method, spec: methods.apply(
      plain, (dict(where='layers/.*', method=method, spec=spec),))
  steps = {('float', ''): step_of(module, plain, tokens)}
  steps |= {case: step_of(module, lean(*case), tokens) for case in CASES}
  found = {case: [] for case in steps}
  for k in range(arguments.rounds + 2):                # the first two compile and warm up
    for case, step in steps.items():
      cpu, wall = time.process_time(), time.perf_counter()
      step()
      if k >= 2:
        found[case].append((time.perf_counter() - wall, time.process_time() - cpu))
  print(f'{arguments.size}: {size}; float32, {os.cpu_count()} cores, {jax.devices()[0]}, '
        f'jax {jax.__version__}, load {os.getloadavg()[0]:.1f}; medians of {arguments.rounds}\n')
  print('| method | scheme | step, ms | CPU, ms | times float, wall | CPU |\n'
        '| --- | --- | ---: | ---: | ---: | ---: |')
  worst = 0.
  for (method, spec), rows in found.items():
    wall, cpu = (statistics.median(column) for column in zip(*rows))
    times = [statistics.median(a[k] / b[k] for a, b in zip(rows, found['float', '']))
             for k in (0, 1)]
    worst = max(worst, times[0])
    print(f'| {method} | {spec} | {1e3 * wall:.1f} | {1e3 * cpu:.1f} | {times[0]:.2f} | '
          f'{times[1]:.2f} |')
  print(f'\nthe slowest takes {worst:.2f} times the float step; the bound is {BOUND}')
  sys.exit(int(worst > BOUND))


if __name__ == '__main__':
  main()
