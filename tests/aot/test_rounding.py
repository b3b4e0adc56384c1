"""Roundings compile for TPUs, and pass over their operands as often as they must (extra `aot`)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'compile_rounding.py'


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
def test_a_tpu_reads_what_it_rounds_once_and_writes_it_once(topology):
  pytest.importorskip('libtpu')
  done = subprocess.run([sys.executable, SCRIPT, topology], capture_output=True, text=True,
                        env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  for name, case in found.items():
    assert case['temporaries'] <= 2 ** 20, name
    if name.startswith('gradients'):                     # v and g in, and the gradient of v out
      assert case['moved'] <= 3.25, name
    if name.startswith('rows'):      # bfloat16 in; a byte or half of one out, a tile of steps a row
      assert case['moved'] <= 1 + int(name[8]) / 16 + 128 * 4 / (4096 * 2) + .01, name
