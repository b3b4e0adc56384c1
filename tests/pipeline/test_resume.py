"""A run killed at any moment, and started again by the same command, ends with the same bits."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.xla import QUICK

SMALL = pathlib.Path(__file__).parent / 'small.py'


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  """The command as a function of the work directory, and the environment, for one text."""
  folder = tmp_path_factory.mktemp('resume')
  words = np.random.default_rng(0).choice(['red', 'blue', 'green', 'ball', 'runs', 'sees'], 20_000)
  (folder / 'text.txt').write_text('\n'.join(' '.join(w) for w in words.reshape(-1, 8)))
  environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / 'compiled'),
                     XLA_FLAGS=QUICK,
                     JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0')
  command = lambda workdir: [sys.executable, '-m', 'lean_jax', 'run',
                             f'--config={SMALL}:{folder / "text.txt"}', f'--workdir={workdir}']
  return command, environment


def until(process, path, step, limit=1200):
  """Waits for a step's line in a file of metrics."""
  end = time.monotonic() + limit
  while time.monotonic() < end and process.poll() is None:
    if path.exists():
      lines = [x for x in path.read_text().splitlines(keepends=True) if x.endswith('\n')]
      if lines and json.loads(lines[-1])['step'] >= step:
        return
    time.sleep(.005)
  raise AssertionError(f'{path} never reached step {step}: {process.communicate()}')


def digests(workdir):
  return {p.parent.name: json.loads(p.read_text())['digests']
          for p in sorted(workdir.glob('variants/*/lean.json'))}


def test_killed_and_stopped_runs_end_with_the_bits_of_an_uninterrupted_one(setting, tmp_path):
  command, environment = setting
  run = lambda workdir: subprocess.Popen(command(workdir), env=environment, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  straight, broken = tmp_path / 'straight', tmp_path / 'broken'
  process = run(straight)
  _, err = process.communicate()
  assert process.returncode == 0, err

  process = run(broken)                                # killed in the teacher's training
  until(process, broken / 'training/teacher/metrics.jsonl', 37)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert not (broken / 'variants').exists()

  process = run(broken)                                # asked to stop in the student's
  until(process, broken / 'training/student/metrics.jsonl', 55)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate()
  assert process.returncode == 0, err
  assert 'saved' in err and not (broken / 'variants/student').exists()

  process = run(broken)
  _, err = process.communicate()
  assert process.returncode == 0, err
  assert 'done before' in err
  assert digests(broken) == digests(straight) and set(digests(straight)) == {
      'teacher', 'student-hard', 'student'}
  # It really went on: no step twice in the metrics, none left out.
  for name in ('teacher', 'student'):
    lines = (broken / f'training/{name}/metrics.jsonl').read_text().splitlines()
    assert [json.loads(x)['step'] for x in lines] == list(range(1, 201))

  report = json.loads((broken / 'report.json').read_text())
  assert {'variants', 'claims', 'settings', 'versions'} <= set(report)
  wanted = {'name', 'parameters', 'bytes', 'perplexity', 'bits_per_byte',
            'prefill_tokens_per_second', 'decode_tokens_per_second', 'peak_memory_bytes',
            'train_seconds'}
  assert all(wanted <= set(v) for v in report['variants'])
  assert (broken / 'pareto.png').read_bytes().startswith(b'\x89PNG')
  assert 'student-hard' in (broken / 'report.md').read_text()

