"""Tokens a second of greedy generation with weights of few bits, against the same model in float32.

python benchmarks/generate_lean.py [--layers 4] [--width 2048] [--vocabulary 8192] [--rounds 3]

A random Llama; all weights of its layers and its output head are quantized by rounding. What is
timed are the compiled programs of `lean-jax generate`, one prompt of 64 tokens and 64 after it.
"""
import argparse
import os

import jax
import jax.numpy as jnp

from lean_jax import tree
from lean_jax.evaluation.speed import speed
from lean_jax.kernels.native import library
from lean_jax.methods import apply
from lean_jax.models.decoder import DecoderConfig

WHERE = '(.*/)?(layers/.*|head/kernel)'
SCHEMES = ('w8a16', 'w4a16-g64', 'nf4-g64', 'w8a8', 'w4a8-g64')


def model(layers, width, vocabulary):
  """(module, params) with random weights."""
  config = DecoderConfig(layers=layers, vocabulary=vocabulary, width=width, heads=width // 64,
                         groups=width // 256, head_width=64, hidden=width * 11 // 4 // 64 * 64,
                         context=256, tied=False)
  module = config.module
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
  return module, params


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--vocabulary', type=int, default=8192)
  parser.add_argument('--rounds', type=int, default=3)
  a = parser.parse_args()
  module, params = model(a.layers, a.width, a.vocabulary)
  print(f'{a.layers} layers, width {a.width}, {a.vocabulary} tokens, '
        f'{tree.parameters(params) / 1e6:.0f} M parameters; jax {jax.__version__}, '
        f'{len(os.sched_getaffinity(0))} threads; kernels: '
        f'{library.why_not() or library.level()}\n')
  print('| weights | MB | decode, tokens/s | times | prefill, tokens/s | times |\n'
        '| --- | ---: | ---: | ---: | ---: | ---: |')
  base = None
  for scheme in ('float32', *SCHEMES):
    weights = params if scheme == 'float32' else apply(
        params, [dict(where=WHERE, method='rtn', spec=scheme)])
    r = speed(module, weights, prompt=64, decode=64, batch=1, repeats=a.rounds)
    base = base or r
    cells = [f'{r[k]:.1f} | {r[k] / base[k]:.2f}' for k in ('decode_tokens_per_second',
                                                            'prefill_tokens_per_second')]
    print(f'| {scheme} | {tree.nbytes(weights) / 1e6:.0f} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
  main()
