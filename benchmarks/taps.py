"""What it costs to look inside: a distillation step by soft labels alone, and with losses on taps.

python benchmarks/taps.py [--size small|large] [--rounds 9]

A student of half the teacher's layers, all on the same batch, taking turns in one process. Prints,
of each list of losses: tokens a CPU-second (all threads) and a second of wall time, medians over
rounds, their ratios to soft labels alone, and the bytes that the compiler gives to what the
gradient has in memory for a while. Without losses on them taps are not in the program at all: a
test of tests/models/test_taps.py compares it with one that never had any.
"""
import argparse
import os

import train_step

SOFT = dict(kind='forward_kl')
LISTS = {
    'soft labels': [SOFT],
    'and embedding': [SOFT, dict(kind='embedding')],
    'and hidden': [SOFT, dict(kind='hidden')],
    'and CKA': [SOFT, dict(kind='cka')],
    'and attention': [SOFT, dict(kind='attention')],
    'and MiniLM': [SOFT, dict(kind='minilm')],
    'and MiniLMv2': [SOFT, dict(kind='minilmv2', relation_heads=4)],
    'TinyBERT': [SOFT, dict(kind='embedding'), dict(kind='hidden'), dict(kind='attention')]}


def main():
  """Prints the ratios."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=train_step.SIZES, default='small')
  parser.add_argument('--rounds', type=int, default=9)
  arguments = parser.parse_args()
  import jax
  import numpy as np

  from lean_jax.distillation.losses import parsed, weighted
  size = train_step.SIZES[arguments.size]
  tokens = np.random.default_rng(0).integers(
      0, size['vocabulary'], (size['batch'], size['context'])).astype(np.int32)
  big, known = train_step.jax_model(size, 1)
  small, params = train_step.jax_model(dict(size, layers=size['layers'] // 2))
  steps, held = {}, {}
  for name, losses in LISTS.items():
    loss = weighted(small, big, parsed(small.config, big.config, losses))
    gradient = jax.jit(jax.grad(lambda p, t, loss=loss: loss(
        p, dict(tokens=tokens), None, teacher_params=t)[0]))
    held[name] = gradient.lower(params, known).compile().memory_analysis().temp_size_in_bytes
    own = jax.tree.map(lambda x: x.copy(), params)     # a step gives its arrays to the next one
    steps[name] = train_step.looped(loss, own, tokens, frozen=dict(teacher_params=known))
  print(f'{arguments.size}: {size}; float32, {os.cpu_count()} cores, {jax.devices()[0]}, '
        f'jax {jax.__version__}')
  found = train_step.taking_turns(steps, arguments.rounds)
  base = found['soft labels']
  for name, (cpu, wall) in found.items():
    print(f'{name:<14} {tokens.size / cpu:9,.0f} tokens/CPU-s  {tokens.size / wall:9,.0f} tokens/s'
          f'  time over soft labels alone {cpu / base[0]:.2f} (CPU)  {wall / base[1]:.2f} (wall)'
          f'  {held[name] / 2 ** 20:6.1f} MiB temporary')


if __name__ == '__main__':
  main()
