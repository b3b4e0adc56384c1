"""Saving and restoring a training state: ours, plain Orbax, and numpy's files; taking turns.

python benchmarks/checkpoint.py [--gigabytes 1] [--rounds 3] [--folder DIR]

The state is a Llama's parameters and two moments of Adam, float32, random, on one device. Prints,
of each, medians over rounds: seconds until the training may go on (ours and Orbax write in the
background), until all is on disk, and to restore; CPU-seconds of each. Ours is Orbax with what it
does not do: a digest of every array, compared again on the way back. numpy's is the floor: an .npy
an array, with fsync. Restoring finds the files in the system's cache.
"""
import argparse
import os
import pathlib
import platform
import shutil
import statistics
import tempfile
import time

import train_step

SIZE = dict(vocabulary=8192, width=1024, heads=8, groups=8, head_width=128, hidden=3072,
            context=128, batch=1)


def state(size):
  """(parameters, moments) of about `size` bytes."""
  import jax
  import jax.numpy as jnp

  from lean_jax import tree
  shapes = lambda layers: jax.eval_shape(
      lambda: train_step.jax_model(dict(SIZE, layers=layers))[1])
  one, two = (3 * tree.nbytes(shapes(k)) for k in (1, 2))
  like = shapes(max(1, 1 + round((size - one) / (two - one))))
  leaves, shape = jax.tree.flatten(dict(params=like, mu=like, nu=like))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  made = jax.tree.unflatten(shape, [
      jax.random.normal(key, x.shape, jnp.float32) for key, x in zip(keys, leaves)])
  return jax.block_until_ready(made)


class Ours:
  def save(self, folder, params, moments):
    from lean_jax.training.checkpoint import Checkpoints
    self.one = Checkpoints(folder / 'ours', every=1)
    self.one.save(1, params, moments, {})
    return self.one.close

  def restore(self, folder, params, moments):
    from lean_jax.training.checkpoint import Checkpoints
    return Checkpoints(folder / 'ours', every=1).restore(params, moments)[1:3]


class Orbax:
  def save(self, folder, params, moments):
    import orbax.checkpoint as ocp
    self.one = ocp.StandardCheckpointer()
    self.one.save(folder / 'orbax', dict(params=params, moments=moments))
    return self.one.close

  def restore(self, folder, params, moments):
    import jax
    import orbax.checkpoint as ocp
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                        dict(params=params, moments=moments))
    with ocp.StandardCheckpointer() as one:
      found = one.restore(folder / 'orbax', like)
    return found['params'], found['moments']


class Numpy:
  def save(self, folder, params, moments):
    import jax
    import numpy as np
    (folder / 'numpy').mkdir()
    for k, x in enumerate(jax.tree.leaves((params, moments))):
      with (folder / 'numpy' / f'{k}.npy').open('wb') as file:
        np.save(file, x)
        os.fsync(file.fileno())
    return lambda: None

  def restore(self, folder, params, moments):
    import jax
    import numpy as np
    leaves, shape = jax.tree.flatten((params, moments))
    return jax.tree.unflatten(shape, [jax.device_put(np.load(folder / 'numpy' / f'{k}.npy'))
                                      for k in range(len(leaves))])


def timed(call, *arguments):
  """(what a call gives, its seconds, its CPU-seconds)."""
  cpu, wall = train_step.cpu_seconds(), time.perf_counter()
  made = call(*arguments)
  return made, time.perf_counter() - wall, train_step.cpu_seconds() - cpu


def turn(who, folder, params, moments):
  """A save and a restore: dict of seconds."""
  import jax
  wait, blocked, cpu = timed(who.save, folder, params, moments)
  _, waited, more = timed(wait)
  restore = lambda: jax.block_until_ready(who.restore(folder, params, moments))
  found, restored, back = timed(restore)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((params, moments)), strict=True):
    assert (a == b).all()
  size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
  for path in folder.iterdir():
    shutil.rmtree(path)
  return dict(blocked=blocked, saved=blocked + waited, save_cpu=cpu + more, restored=restored,
              restore_cpu=back, disk=size / 1e9)


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--gigabytes', type=float, default=1.)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--folder', help='on the disk to measure')
  arguments = parser.parse_args()
  import importlib.metadata

  import jax

  from lean_jax import tree
  trees = state(arguments.gigabytes * 1e9)
  params, moments = trees['params'], dict(mu=trees['mu'], nu=trees['nu'])
  sides = {'lean_jax Checkpoints': Ours(), 'Orbax StandardCheckpointer': Orbax(),
           'numpy.save and fsync': Numpy()}
  rows = {name: [] for name in sides}
  with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
    for k in range(arguments.rounds + 1):              # the first warms up
      for name, who in sides.items():
        found = turn(who, pathlib.Path(folder), params, moments)
        if k:
          rows[name].append(found)
  print(f'{tree.nbytes(trees) / 1e9:.2f} GB in {len(jax.tree.leaves(trees))} arrays, medians of '
        f'{arguments.rounds}; {jax.devices()[0].device_kind}, {os.cpu_count()} cores, Python '
        f'{platform.python_version()}, jax {jax.__version__}, orbax-checkpoint '
        f'{importlib.metadata.version("orbax-checkpoint")}; load {os.getloadavg()[0]:.1f}\n')
  print('| | blocks, s | saved, s | CPU s | restored, s | CPU s | GB on disk |\n| --- |'
        + ' ---: |' * 6)
  for name, found in rows.items():
    middle = [statistics.median(f[k] for f in found) for k in found[0]]
    print(f'| {name} | ' + ' | '.join(f'{x:.2f}' for x in middle) + ' |')


if __name__ == '__main__':
  main()
