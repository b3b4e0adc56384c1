"""The sharded distillation step on one process and on several: tokens a second, and CPU-seconds.

python benchmarks/scaling.py [--size small|large] [--steps 10] [--rounds 3]

The same mesh (data 2 x fsdp 2) of four CPU devices is that of one process, of two with two devices
each, and of four with one each, joined by jax.distributed; before them one process with one device.
A student of half the teacher's layers; half of the loss is KL, half cross-entropy. All processes
share the cores of one machine, so that several cannot be faster than one: what they cost is seen in
CPU-seconds a token, of all processes together. Medians over rounds, in turns, each round in fresh
processes; compilation and the first steps do not count. All must end with the same loss.
"""
import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time

import train_step

CASES = ((1, 1), (1, 4), (2, 2), (4, 1))               # processes, devices of each
WARM = 3                                               # steps before those that count


def child(size, steps, count, host, port):
  """Trains as one of `count` processes, and prints what it took, as JSON."""
  import jax
  import numpy as np

  from lean_jax.distillation.losses import distillation
  from lean_jax.training import hosts
  from lean_jax.training import mesh as meshes
  from lean_jax.training.loop import fit
  from lean_jax.training.optimizer import adamw
  if count > 1:
    hosts.start(count, coordinator=f'localhost:{port}', host=host)
  mesh = meshes.make_mesh(**(dict(data=2, fsdp=2) if jax.device_count() == 4 else {}))
  size = train_step.SIZES[size]
  (teacher, known), (student, params) = train_step.jax_model(size, 1), train_step.jax_model(
      dict(size, layers=size['layers'] // 2))
  rng = np.random.default_rng(0)
  batches = [dict(tokens=rng.integers(0, size['vocabulary'], (size['batch'], size['context']))
                  .astype(np.int32)) for _ in range(WARM + steps)]
  found = {}

  def hook(step, metrics):
    if step in (WARM, WARM + steps):
      found['loss'] = float(metrics['loss'])           # waits for it
      found.setdefault('at', []).append((train_step.cpu_seconds(), time.perf_counter()))
  loss = distillation(student, teacher, temperature=2., soft_weight=.5)
  fit(loss, params, batches, adamw(steps=10 ** 6, peak=train_step.PEAK),
      steps=WARM + steps, frozen=dict(teacher_params=known), mesh=mesh, hooks=[hook],
      check_every=WARM + steps + 1)
  (cpu, wall), (cpu_end, wall_end) = found['at']
  print(json.dumps(dict(cpu=cpu_end - cpu, wall=wall_end - wall, loss=found['loss'],
                        device=jax.devices()[0].device_kind)))


def run(size, steps, count, devices):
  """What all processes of a case took: CPU-seconds of all, seconds of the slowest, the loss."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  environment = dict(os.environ, JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES=str(devices))
  started = [subprocess.Popen(
      [sys.executable, __file__, '--size', size, '--steps', str(steps), '--child', str(count),
       str(host), str(port)], env=environment, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE) for host in range(count)]
  said = [p.communicate() for p in started]
  if any(p.returncode for p in started):
    raise SystemExit('\n'.join(err for _, err in said))
  found = [json.loads(out.splitlines()[-1]) for out, _ in said]
  return dict(cpu=sum(f['cpu'] for f in found), wall=max(f['wall'] for f in found),
              loss=found[0]['loss'], device=found[0]['device'])


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=train_step.SIZES, default='small')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--child', nargs=3, type=int, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    child(arguments.size, arguments.steps, *arguments.child)
    return
  import jax
  size, found = train_step.SIZES[arguments.size], {case: [] for case in CASES}
  for _ in range(arguments.rounds):
    for case in CASES:
      found[case].append(run(arguments.size, arguments.steps, *case))
  losses = [f['loss'] for rows in found.values() for f in rows]
  assert max(losses) - min(losses) < 1e-4 * max(losses), losses
  tokens = arguments.steps * size['batch'] * size['context']
  print(f'{arguments.size}: {size}; float32, medians of {arguments.rounds}; '
        f'{found[CASES[0]][0]["device"]}, {os.cpu_count()} cores that all processes share, Python '
        f'{platform.python_version()}, jax {jax.__version__}; load {os.getloadavg()[0]:.1f}\n')
  print('| processes | devices of each | tokens/s | CPU-seconds a million tokens | times 1 x 1 | '
        'times 1 x 4 |\n|' + ' ---: |' * 6)
  middle = {case: {k: statistics.median(f[k] for f in rows) for k in ('cpu', 'wall')}
            for case, rows in found.items()}
  for (count, devices), f in middle.items():
    print(f'| {count} | {devices} | {tokens / f["wall"]:,.0f} | {f["cpu"] / tokens * 1e6:,.1f} | '
          + ' | '.join(f'{f["cpu"] / middle[base]["cpu"]:.2f}' for base in CASES[:2]) + ' |')


if __name__ == '__main__':
  main()
