"""The sharded step compiles for real TPUs, on a machine that has none (extra `aot`: libtpu)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent


def run(script, *arguments):
  """What a script printed last."""
  pytest.importorskip('libtpu')
  done = subprocess.run([sys.executable, FOLDER / script, *arguments], capture_output=True,
                        text=True, env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v6e:2x2'])
@pytest.mark.parametrize('kind', ['dense', 'qat', 'qlora'])
def test_a_sharded_distillation_step_compiles_for_a_tpu(topology, kind):
  found = run('compile_step.py', topology, kind)
  assert found['chip'] < .4 * found['whole']             # on four chips: it is really sharded


@pytest.mark.slow
@pytest.mark.parametrize('axes', [('embed', 'mlp'), ('mlp', 'embed')], ids='-'.join)
@pytest.mark.parametrize(('scheme', 'stored'), [('w4a16-g128', 's4'), ('w8a8', 's8')])
def test_a_sharded_product_is_the_kernels_and_gathers_integers(scheme, stored, axes):
  found = run('compile_product.py', scheme, *axes)
  assert found['kernel']
  wanted = [stored, '2048,2048' if axes[0] == 'embed' else '1024,4096']
  assert wanted in found['gathered']
  # besides, scales: a row for each 128 of the weight, or one
  assert all(g == wanted or int(g[1].split(',')[0]) <= 16 for g in found['gathered'])
