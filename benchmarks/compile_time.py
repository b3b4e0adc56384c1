"""Seconds that a decoder's forward takes to compile, of 12 layers and of 48.

python benchmarks/compile_time.py [--layers 12 48] [--rounds 5]

Each is traced, lowered and compiled anew, in turns; medians. Stacked layers (scan_layers=True) are
compiled once for all, written-out layers each. Ends with exit code 1 where the most stacked layers
take twice as long as the fewest.
"""
import argparse
import os
import statistics
import sys
import time

SIZE = dict(vocabulary=4096, width=256, heads=8, groups=4, head_width=32, hidden=704, context=256)


def forward(layers, scan):
  """A function that compiles and gives (seconds of tracing and lowering, of compiling)."""
  import jax
  import jax.numpy as jnp

  from lean_jax.interop.hf import abstract
  from lean_jax.models.decoder import DecoderConfig
  config = DecoderConfig(layers=layers, scan_layers=scan, **SIZE)
  params = abstract(config)
  tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)

  def once():
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(lambda p, t: config.module.apply({'params': p}, t)[0]).lower(params, tokens)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle
  return once


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--layers', type=int, nargs=2, default=(12, 48))
  parser.add_argument('--rounds', type=int, default=5)
  arguments = parser.parse_args()
  import jax
  jax.config.update('jax_enable_compilation_cache', False)
  cases = [(layers, scan) for scan in (True, False) for layers in sorted(arguments.layers)]
  runs = {case: forward(*case) for case in cases}
  found = {case: [] for case in cases}
  for k in range(arguments.rounds + 1):
    for case, once in runs.items():
      row = once()
      if k:                                            # the first finds nothing imported
        found[case].append(row)
  print(f'{SIZE}, tokens [2 64]; medians of {arguments.rounds}, {os.cpu_count()} cores, '
        f'{jax.devices()[0]}, jax {jax.__version__}\n')
  print('| layers | scan_layers | trace and lower, s | compile, s | together, s |\n'
        '| ---: | --- | ---: | ---: | ---: |')
  whole = {}
  for (layers, scan), rows in found.items():
    parts = [statistics.median(column) for column in zip(*rows)]
    whole[layers, scan] = statistics.median(map(sum, rows))
    print(f'| {layers} | {scan} | {parts[0]:.2f} | {parts[1]:.2f} | {whole[layers, scan]:.2f} |')
  few, many = sorted(arguments.layers)
  print()
  for scan in (True, False):
    ratio = whole[many, scan] / whole[few, scan]
    print(f'scan_layers={scan}: {many} layers take {ratio:.2f} times what {few} take')
  sys.exit(int(whole[many, True] >= 2 * whole[few, True]))


if __name__ == '__main__':
  main()
