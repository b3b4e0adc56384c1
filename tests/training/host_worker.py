"""One of several processes that distill a small student on one mesh; see `hosts_run.py`.

python host_worker.py '{"workdir": ..., "mesh": {...}, "steps": 6, ...}' HOSTS HOST PORT
"""
import errno
import json
import os
import pathlib
import signal
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from lean_jax.api import Model
from lean_jax.data.batches import Batches
from lean_jax.data.windows import Windows
from lean_jax.distillation.elsewhere import Elsewhere
from lean_jax.errors import LeanError, Preempted
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import FAMILIES
from lean_jax.training import hosts, loop, recipe
from lean_jax.training import mesh as meshes
from lean_jax.training.checkpoint import save_model

TEACHER = DecoderConfig(vocabulary=48, width=16, layers=2, heads=2, groups=2, head_width=8,
                        hidden=32, context=16)
STUDENT = DecoderConfig(**{**vars(TEACHER), 'layers': 1})


def initial(config, seed):
  tokens = np.zeros((1, 4), np.int32)
  return jax.jit(config.module.init)(jax.random.key(seed), tokens)['params']


def windows():
  array = np.random.default_rng(0).integers(0, 48, (64, 16)).astype(np.uint16)
  return Windows(array, stream_tokens=array.size, bytes=array.size, documents=1, fingerprint='w')


def run(given):
  """Trains, and gives the student's parameters as arrays of this process.

  Args:
    given: workdir, steps, mesh; settings of `recipe.train`; and what befalls the run: `sleep`,
      seconds after each step; `die`, [host, step], or [host, step, N], once step N is
      saved; `stop_at`, a step; `full_at`, [step, N], the step whose save finds a full disk, on host
      0, once step N is saved; `late`, [host, seconds], whose compiler takes so much longer;
      `model`, where the finished one is saved by all; `apart`, the mesh of a teacher on half of
      each host's devices, whose labels are of the whole vocabulary.
  """
  given, at = dict(given), [0]
  workdir = given.pop('workdir')
  sleep, die, stop_at, full_at, late, model, apart = (given.pop(k, None) for k in (
      'sleep', 'die', 'stop_at', 'full_at', 'late', 'model', 'apart'))
  if late and late[0] == jax.process_index():
    loop._gradient = delayed(loop._gradient, late[1])

  def await_saved(*steps):
    for saved in steps:
      while not pathlib.Path(workdir, 'checkpoints', str(saved)).is_dir():
        time.sleep(.05)

  def hook(step, metrics):
    at[0] = step
    if die and die[:2] == [jax.process_index(), step]:
      await_saved(*die[2:])
      os.kill(os.getpid(), signal.SIGKILL)
    if full_at and full_at[0] == step and jax.process_index() == 0:
      await_saved(full_at[1])
      ocp.StandardCheckpointHandler.finalize = full
    time.sleep(sleep or 0)
  batches, known = Batches(windows(), given.pop('batch', 8), 0), initial(TEACHER, 1)
  taught, devices = dict(teacher=(TEACHER.module, known)), None
  if apart:
    devices, others = (jax.devices()[side::2] for side in (0, 1))
    teacher = Model(FAMILIES['llama'], TEACHER, known, None)
    place = Elsewhere(teacher, meshes.make_mesh(**apart, devices=others), TEACHER.vocabulary)
    batches, taught = place.labelled(batches, STUDENT.module), dict(cached=True)
  mesh = meshes.make_mesh(**given.pop('mesh'), devices=devices)
  params, _ = recipe.train(
      STUDENT.module, initial(STUDENT, 0), batches, peak=1e-2, **taught, mesh=mesh, log_every=1,
      folder=workdir, hooks=(hook,), stop=lambda: at[0] + 1 == stop_at, **given)
  if model:
    save_model(model, params, {})
  return hosts.local(params)


def delayed(traced, seconds):
  def function(*arguments):
    time.sleep(seconds)
    return traced(*arguments)
  return function


def full(*_):
  raise OSError(errno.ENOSPC, 'No space left on device')


def main(given, count, host, port):
  given, count = json.loads(given), int(count)
  out = pathlib.Path(given['workdir'], 'params.npz')
  try:
    if count > 1:
      hosts.start(count, coordinator=f'localhost:{port}', host=int(host),
                  heartbeat=given.pop('heartbeat', 10))
    params = run(given)
    hosts.barrier('all have it')                       # an end that is late is no dead host
  except Preempted as error:
    print(error, file=sys.stderr)
    return 0
  except LeanError as error:
    print(error, file=sys.stderr)
    return 2
  if hosts.first():
    np.savez(out, *jax.tree.leaves(params))
  return 0


if __name__ == '__main__':
  sys.modules['torch'] = None          # tensorboardX would take seconds to import it
  sys.exit(main(*sys.argv[1:]))
