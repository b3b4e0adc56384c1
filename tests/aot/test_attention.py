"""attention_decode's kernel compiles for TPUs, and codes are never floats in their memory (extra
`aot`: libtpu)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'compile_attention.py'


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
@pytest.mark.parametrize('bits', ['8', '4'])
@pytest.mark.parametrize('form', ['cache', 'pages'])
def test_the_kernel_compiles_for_a_tpu(topology, bits, form):
  pytest.importorskip('libtpu')
  done = subprocess.run([sys.executable, SCRIPT, topology, bits, form], capture_output=True,
                        text=True, env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['kernel']
  assert found['temporaries'] < 8 * 8192 * 128 * int(bits) // 8      # a row's keys as codes
