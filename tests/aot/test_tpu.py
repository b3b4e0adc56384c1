"""The sharded step compiles for real TPUs, on a machine that has none (extra `aot`: libtpu)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'compile_step.py'


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
@pytest.mark.parametrize('kind', ['dense', 'qat', 'qlora'])
def test_a_sharded_distillation_step_compiles_for_a_tpu(topology, kind):
  pytest.importorskip('libtpu')
  done = subprocess.run([sys.executable, SCRIPT, topology, kind], capture_output=True, text=True,
                        env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found['chip'] < .4 * found['whole']             # on four chips: it is really sharded
