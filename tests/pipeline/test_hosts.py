"""`lean-jax run` by two processes together."""
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from lean_jax.training.checkpoint import load_model
from tests.training.hosts_run import ended
from tests.xla import QUICK

SMALL = pathlib.Path(__file__).parent / 'small.py'


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  """Starts `lean-jax run` by some processes: (how many, workdir, flags of each) -> processes."""
  folder = tmp_path_factory.mktemp('hosts')
  words = np.random.default_rng(0).choice(['red', 'blue', 'green', 'ball', 'runs', 'sees'], 20_000)
  (folder / 'text.txt').write_text('\n'.join(' '.join(w) for w in words.reshape(-1, 8)))

  def run(count, workdir, *flags, more=()):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    environment = dict(
        os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / 'compiled'), JAX_PLATFORMS='cpu',
        XLA_FLAGS=QUICK, JAX_NUM_CPU_DEVICES='2',
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0', TF_CPP_MIN_LOG_LEVEL='3')
    return [subprocess.Popen(
        [sys.executable, '-m', 'lean_jax', 'run', f'--config={SMALL}:{folder / "text.txt"}',
         f'--workdir={workdir}', '--config.phases.teacher.steps=20',
         '--config.phases.student.steps=20', *flags, *(more[k] if more else ()),
         *([f'--hosts={count}', f'--coordinator=localhost:{port}', f'--host={k}',
            '--heartbeat=20'] if count > 1 else [])],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for k in range(count)]
  return run


@pytest.mark.slow
def test_two_hosts_make_the_report_of_one(start, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  (code, said), = ended(start(1, one))
  assert code == 0, said
  mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=2']
  found = ended(start(2, two, *mesh, '--profile=10:12'))
  assert [code for code, _ in found] == [0, 0], found
  assert 'student' in found[0][1] and found[1][1] == ''             # only the first one prints
  reports = [json.loads((w / 'report.json').read_text()) for w in (one, two)]
  for a, b in zip(*(r['variants'] for r in reports), strict=True):
    np.testing.assert_allclose(a['perplexity'], b['perplexity'], rtol=2e-3)
  params, _ = load_model(two / 'variants/student')
  assert params
  assert list((two / 'training/student/profile').rglob('*.xplane.pb'))
  again = ended(start(2, two, *mesh))
  assert [code for code, _ in again] == [0, 0] and 'done before' in again[0][1]


@pytest.mark.slow
def test_two_hosts_with_other_configs_say_so(start, tmp_path):
  found = ended(start(2, tmp_path / 'w', '--config.mesh.data=4',
                      more=[[], ['--config.training.batch=16']]))
  assert [code for code, _ in found] == [2, 2]
  assert all('disagree on the config: config.training.batch is 8 on host 0, 16 on host 1' in said
             for _, said in found), found
