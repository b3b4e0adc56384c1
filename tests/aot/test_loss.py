"""A large head's losses compile for a TPU and leave its memory free (extra `aot`: libtpu)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent / 'compile_loss.py'


@pytest.mark.slow
def test_a_v5e_needs_little_more_than_the_heads_gradient():
  pytest.importorskip('libtpu')
  done = subprocess.run([sys.executable, SCRIPT, 'v5e:2x2', '2048', '131072', '256', 'bfloat16'],
                        capture_output=True, text=True, env=dict(os.environ, XLA_FLAGS=''))
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  logits, gradient = 2048 * 131072 * 4, 256 * 131072 * 4          # in float32: a GiB and 128 MiB
  assert found['plain'] >= 2 * logits
  assert found['fused'] <= gradient + logits // 8 * 2 + 2 ** 22  # of both models, a chunk
  assert found['small'] <= gradient + logits // 64 * 2 + 2 ** 22
