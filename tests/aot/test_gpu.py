"""int8_matmul's GPU kernel compiles for an H200, on a machine that has none (extra `aot-gpu`)."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'compile_gpu.py'


@pytest.mark.parametrize('shape', [(512, 512, 1024), (5, 200, 300)])
def test_int8_units_multiply_and_no_register_is_spilled(shape):
  pytest.importorskip('jax_plugins.xla_cuda13')
  if not shutil.which('ptxas'):
    pytest.skip('needs ptxas on the PATH')
  done = subprocess.run([sys.executable, SCRIPT, *map(str, shape)], capture_output=True, text=True,
                        env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert any('s32.s8.s8' in name for name in found['wgmma'])
  assert found['spilled'] and not any(found['spilled'])
