"""Starts the processes of `host_worker.py`, and reads what they made."""
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

from tests.xla import QUICK

FOLDER = pathlib.Path(__file__).parent
LIMIT = 1200                           # seconds, on a machine with much else to do


def launch(cache, count, given, *, devices=None):
  """The processes of a run, `count` of them.

  Args:
    cache: a folder for compiled programs, which all share.
    given: of the worker; a list of them, one a host.
    devices: of each process; None shares eight.
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = str(s.getsockname()[1])
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=QUICK,
      JAX_NUM_CPU_DEVICES=str(devices or 8 // count), JAX_COMPILATION_CACHE_DIR=str(cache),
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0', PYTHONPATH=os.pathsep.join(sys.path),
      TF_CPP_MIN_LOG_LEVEL='3')
  each = given if isinstance(given, list) else [given] * count
  return [subprocess.Popen(
      [sys.executable, FOLDER / 'host_worker.py', json.dumps(each[k]), str(count), str(k), port],
      env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for k in range(count)]


def ended(processes, limit=LIMIT):
  """[(exit code, what was printed)] of processes that end within some seconds.

  But for what Gloo, which carries collectives between CPUs, prints of whom it is connected to.
  """
  end, out = time.monotonic() + limit, []
  try:
    for p in processes:
      said = p.communicate(timeout=max(end - time.monotonic(), .1))
      lines = ''.join(said).splitlines(keepends=True)
      out.append((p.returncode, ''.join(x for x in lines if not x.startswith('[Gloo]'))))
  finally:
    for p in processes:
      p.kill()
  return out


def finished(processes, limit=LIMIT):
  """What processes printed that all end well."""
  found = ended(processes, limit)
  assert [code for code, _ in found] == [0] * len(found), found
  return [said for _, said in found]


def lines(workdir):
  """The metrics of each step."""
  text = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines(keepends=True)
  return [json.loads(x) for x in text if x.endswith('\n')]


def reaches(workdir, step):
  """Whether the metrics have that step."""
  if not pathlib.Path(workdir, 'metrics.jsonl').exists():
    return False
  return any(x['step'] >= step for x in lines(workdir))


def losses(workdir):
  """The loss of each step, which are there once, and in order."""
  found = lines(workdir)
  assert [x['step'] for x in found] == list(range(1, len(found) + 1))
  return np.array([x['loss'] for x in found], np.float32)


def params(workdir):
  with np.load(pathlib.Path(workdir, 'params.npz')) as file:
    return [file[name] for name in file.files]


def ulps(a, b):
  """How many float32 apart two arrays of positive numbers are, each."""
  return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))


def until(processes, done, limit=LIMIT):
  """Waits until `done()`; False if a process ended before."""
  end = time.monotonic() + limit
  while not done():
    if any(p.poll() is not None for p in processes):
      return False
    assert time.monotonic() < end
    time.sleep(.002)
  return True
