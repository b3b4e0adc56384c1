"""Seconds that `import lean_jax` and `lean-jax --help` take, each in fresh processes.

python benchmarks/import_time.py
"""
import statistics
import subprocess
import sys
import time

CASES = {
    'python -c pass': ['-c', 'pass'],
    'import lean_jax': ['-c', 'import lean_jax'],
    'import lean_jax, then its API': ['-c', 'import lean_jax; lean_jax.load'],
    'import jax': ['-c', 'import jax'],
    'lean-jax --help': ['-m', 'lean_jax', '--help'],
}


def seconds(arguments):
  start = time.perf_counter()
  subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
  return time.perf_counter() - start


def main(repeats=7):
  found = {name: [] for name in CASES}
  for _ in range(repeats):
    for name, arguments in CASES.items():
      found[name].append(seconds(arguments))
  for name, values in found.items():
    print(f'{name:<32} {statistics.median(values):6.3f} s  (least {min(values):.3f})')


if __name__ == '__main__':
  main()
