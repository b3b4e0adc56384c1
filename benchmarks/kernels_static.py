"""What the TPU kernels take by the compiler's own schedule, with no TPU (extra `aot`).

  python benchmarks/kernels_static.py [--devices v5e v6e] [--all]

Cycles are bundles of the schedule times the steps of the grid, without waiting; `memory` is what
the bytes of the call take at the device's bandwidth; the share is of the peak of the units that
multiply, by the slower of the two. `bf16` is the memory of the same product with a bfloat16 weight
over the slower of the two: what may be gained where decoding waits for memory. A share of 100% says
that the schedule has fewer bundles than the units need: then they are the limit. A dash is XLA's.
Of E experts (a Mixtral's) each has as many rows; tiles that two of them share are computed twice.
"""
import argparse

from lean_jax.kernels.platforms import calls, schedule

CASES = [dict(op='weight_only_matmul', m=m, k=4096, n=4096, group=g, bits=b)
         for m in (16, 512) for b, g in ((4, 128), (4, 32), (2, 64), (8, 128))]
CASES += [dict(op='int8_matmul', m=m, k=4096, n=4096, group=g, bits=b)
          for m in (16, 512) for b, g in ((8, None), (4, None), (4, 128))]
CASES += [dict(op=op, m=m, k=4096, n=14336, group=g, bits=b, experts=8) for m in (16, 4096)
          for op, b, g in (('weight_only_matmul', 16, None), ('weight_only_matmul', 4, 128),
                           ('int8_matmul', 8, None))]
LARGE = [dict(op='int8_matmul', m=4096, k=4096, n=4096, group=None, bits=8),
         dict(op='int8_matmul', m=512, k=14336, n=4096, group=None, bits=8),
         dict(op='weight_only_matmul', m=16, k=8192, n=28672, group=128, bits=4)]
WIDE = '{:<20}{:<12}{:>4}{:>6}{:>7}{:>7}{:>6}{:>6}{:>10}{:>10}{:>8}{:>8}{:>8}'


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--devices', nargs='+', default=['v5e', 'v6e'], help='v5e, v5p, v6e')
  parser.add_argument('--all', action='store_true', help='with shapes that take minutes to compile')
  a = parser.parse_args()
  cases = CASES + (LARGE if a.all else [])
  print(WIDE.format('op', 'device', 'E', 'm', 'k', 'n', 'bits', 'group', 'cycles', 'memory',
                    'share', 'bf16', 'spills'))
  for r in schedule.measure([c | dict(device=d) for d in a.devices for c in cases]):
    print(WIDE.format(r['op'], r['device'], r.get('experts', '-'), r['m'], r['k'], r['n'],
                      r['bits'], r['group'] or '-', *figures(r)), flush=True)


def figures(r):
  """Cycles, cycles of memory, the share, the gain over a bfloat16 weight, and spills."""
  if 'error' in r:
    return 'error', '-', '-', '-', '-'
  if not r.get('cycles'):
    return ('-',) * 5
  slower = max(r['cycles'], r['memory_cycles'])
  each = r['memory_cycles'] / calls.call(r).bytes
  weights = r['k'] * r['n'] * min(r.get('experts', 1), r['m'])
  floats = each * 2 * (r['m'] * r['k'] + weights + r['m'] * r['n'])
  gain = f'{floats / slower:.1f}x' if r['m'] <= 64 else '-'
  return f'{r["cycles"]:,}', f'{r["memory_cycles"]:,}', f'{r["share"]:.0%}', gain, r['spills']


if __name__ == '__main__':
  main()
