"""The GPU kernels compile for an H200, on a machine that has none (extra `aot-gpu`)."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'compile_gpu.py'


def compiled(*arguments):
  """What compile_gpu.py says of a call of an op."""
  pytest.importorskip('jax_plugins.xla_cuda13')
  if not shutil.which('ptxas'):
    pytest.skip('needs ptxas on the PATH')
  done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True,
                        text=True, env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['spilled'] and not any(found['spilled'])
  return found


@pytest.mark.parametrize('sizes', [
    (1024, 2048, 1024), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in (
        (1030, 2000, 300), (256, 2048, 256, 8), (4096, 4096, 4096)))])
def test_int8_units_multiply_and_no_register_is_spilled(sizes):
  found = compiled('w8a8', *sizes)
  assert found['wgmma'] and all('s32.s8.s8' in name for name in found['wgmma'])


@pytest.mark.parametrize(('scheme', 'sizes'), [
    ('w4a16-g128', (1, 4096, 4096)), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('w4a16-g128', (1, 8192, 28672)), ('w4a16-g128-asym', (16, 4096, 4096)),
        ('w4a16-g64', (512, 28672, 8192)), ('w4a16-g64-asym', (20, 8256, 4096)),
        ('w4a16-g32-asym', (33, 4096, 4096)), ('w4a16-g32', (1, 4096, 4096, 2)),
        ('w4a16', (4, 4096, 4096)), ('w8a16-g128', (1, 4096, 4096)),
        ('w8a16-g32-asym', (100, 4096, 4096)), ('w2a16-g64-asym', (1, 4096, 4096))))])
def test_codes_are_widened_in_registers_and_no_weight_in_memory(scheme, sizes):
  found = compiled(scheme, *sizes)
  assert found['wgmma'] and all('f32.bf16.bf16' in name for name in found['wgmma'])
  M, N, K, *experts = sizes
  # Float sums of at most 528 blocks of 128 x 16, or 132 of 128 x 64, and more where M x N is; and x
  # in another order. A copy of the codes would be N * K / 2 bytes or more.
  sums = max(4 * 132 * 128 * 64, 4 * (M + 63) * N) + 6 * (M + 63) * K
  assert found['temporaries'] < (experts or [1])[0] * sums < (experts or [1])[0] * N * K // 2


@pytest.mark.parametrize(('form', 'sizes'), [
    ('cache', (8, 128, 4, 4096, 128, 4, 32)), *(pytest.param(*c, marks=pytest.mark.slow) for c in (
        ('pages', (8, 8, 8, 4096, 128, 4, 32)), ('cache', (4, 8, 16, 4096, 128, 1, 256)),
        ('pages', (4, 8, 4, 4096, 128, 4, 64)), ('cache', (8, 8, 4, 4096, 256, 8, 64)),
        ('cache', (4, 8, 4, 4096, 256, 8, 32)), ('pages', (8, 8, 1, 4096, 256, 1, 64))))])
def test_cached_codes_are_widened_in_registers_and_none_in_memory(form, sizes):
  found = compiled(form, *sizes)
  assert found['wgmma'] and all('f32.bf16.bf16' in name for name in found['wgmma'])
  bits, N, R, S, K, *_ = sizes
  # What 264 blocks of 8 heads find, float32, as they find it and in order of channels, and a bit:
  # less than the keys, as codes, of the rows that keep so many blocks at work.
  blocks = max(264, N * -(-R // 8))
  assert found['temporaries'] < 2 * blocks * (K + 64) * 8 * 4 + N * S < 264 * S * K * bits // 8
