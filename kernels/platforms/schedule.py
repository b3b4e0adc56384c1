"""Cycles of a kernel on a TPU that is not there: the compiler's own schedule, counted.

libtpu compiles for every TPU on a machine without one, and can write the final schedule of each
kernel: one line a bundle of instructions, one bundle a cycle where nothing stalls. A kernel's
schedule is the work of one step of its grid, so its cycles are lines times steps: more than the
truth where a branch is not always taken (what follows the last tile of K counts in each step), less
where units wait for each other or for memory. So no time is taken to be less than what the units
that multiply need at their peak, nor than what the bytes of the call need at the bandwidth.

The dump is asked for in the environment before libtpu loads, and is in files; so programs are
compiled by a worker process, `python -m lean_jax.kernels.platforms.schedule`, which reads a JSON
request a line.
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

TOPOLOGIES = {'TPU v4': 'v4:2x2x1', 'TPU v5 lite': 'v5e:2x2', 'TPU v5': 'v5p:2x2x1',
              'TPU v6 lite': 'v6e:2x2', 'TPU7x': 'tpu7x:2x2x1'}
# Cycles a second. They follow from the published peaks: 394 TOPS of int8 at 2 * 131072 products a
# cycle, 918 at 2 * 262144 and 1836 at 2 * 524288.
CLOCK = {'TPU v5 lite': 1.503e9, 'TPU v5': 1.751e9, 'TPU v6 lite': 1.751e9}
MODULE = 'lean_jax.kernels.platforms.schedule'
_DUMP = '-final_hlo-static-per-bundle-utilization.txt'


def measure(requests):
  """What the schedules of some calls say, one after the other.

  Args:
    requests: dicts of a 'device' (as of `device.target`), 'op', 'm', 'k', 'n', 'group' (or None),
      'bits' of a weight, 'blocks' (or None: as tuned), and 'implementation' (None is the fastest).

  Yields:
    A dict each: what was asked, and 'error', or
      kernels: {name: bundles} of all that was compiled.
      bundles: of the kernel of the op; None where XLA serves.
      cycles: bundles times `steps` of the grid; like the next two, of one core with all the work.
      unit_cycles: for the products of one call at the peak of the units that multiply.
      memory_cycles: for the bytes of one call at the bandwidth of the device.
      share: unit_cycles over the greatest of the three, and of what the units need for tiles that
        are multiplied again, for another expert; `peak`: 'int8' or 'bf16' units.
      temporaries: bytes of the whole call's.
      units: {instruction: how often} of those that feed the units, in one step.
      spills: stores of registers for want of room, in one step; they are among the bundles.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
  """
  import importlib.util
  if importlib.util.find_spec('libtpu') is None:
    raise ModuleNotFoundError('schedules are compiled by libtpu; pip install libtpu')
  left = list(requests)
  while left:
    with tempfile.TemporaryDirectory() as folder:
      worker = _worker(folder)
      out, _ = worker.communicate('\n'.join(map(json.dumps, left)))
    found = [json.loads(line[1:]) for line in out.splitlines() if line.startswith('=')]
    yield from found
    left = left[len(found):]
    if left:                                               # the compiler took its process with it
      yield left.pop(0) | dict(error=f'the compiler ended with exit code {worker.returncode}')


def _worker(folder):
  environment = dict(
      os.environ, JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
      TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1', XLA_FLAGS='',
      LIBTPU_INIT_ARGS=f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true '
      '--xla_jf_dump_llo_pass_label_regex=final')          # of 65 passes; all take twice the time
  return subprocess.Popen([sys.executable, '-m', MODULE, folder], env=environment, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def main(folder):
  """The worker: requests on standard input, '=' and what was found on standard output."""
  for line in sys.stdin:
    request = json.loads(line)
    for file in pathlib.Path(folder).iterdir():
      if file.is_file():
        file.unlink()
    try:
      found = _compiled(request, pathlib.Path(folder))
    except Exception as error:                             # any that compilers raise is a result
      found = dict(error=' '.join(str(error).split())[:500])
    print('=' + json.dumps(request | found), flush=True)


def _compiled(request, folder):
  import jax
  import numpy as np
  from jax.experimental import topologies

  from lean_jax.kernels.platforms import calls, device
  kind = device.full_name(request['device'])
  chips = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGIES[kind]).devices
  mesh = jax.sharding.Mesh(np.array(chips[:1]), ('x',))
  call = calls.call(request)
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed) for a in call.shapes]
  with jax.sharding.set_mesh(mesh):
    done = jax.jit(call.run).trace(*shapes).lower(lowering_platforms=('tpu',)).compile()
    info = device.tpu()
    steps, again = call.steps(), call.again()
  found = read(folder, call.name)
  out = dict(kernels=found['kernels'], bundles=found['bundles'], units=found['units'],
             spills=found['spills'], steps=steps,
             temporaries=done.memory_analysis().temp_size_in_bytes)
  if found['bundles'] is None or kind not in CLOCK:
    return out
  peak = info.int8_ops_per_second if call.int8 else info.bf16_ops_per_second
  times = dict(cycles=found['bundles'] * steps,
               unit_cycles=round(call.operations / peak * CLOCK[kind]),
               memory_cycles=round(call.bytes / info.mem_bw_bytes_per_second * CLOCK[kind]))
  return out | times | dict(peak='int8' if call.int8 else 'bf16',
                            share=round(times['unit_cycles'] / max(
                                *times.values(), again * times['unit_cycles']), 4))


def read(folder, name):
  """Of a folder of dumps: bundles a kernel; and the units and spills of the one of that name."""
  kernels, spills = {}, {}
  for file in sorted(folder.glob(f'*{_DUMP}')):
    kernel = re.fullmatch(r'\d+-(.*)-\d+', file.name.removesuffix(_DUMP)).group(1)
    if not kernel.startswith('<'):
      head, rows = file.read_text().split('== UTILIZATION:')
      at = [h.strip() for h in head.strip().splitlines()[1].split(',')].index('VSTORE:SPILL')
      rows = [r.split() for r in rows.strip().splitlines() if r.strip()]
      kernels[kernel], spills[kernel] = len(rows), sum(int(r[at]) for r in rows)
  ours = next((k for k in kernels if k.split('.')[0] == name), None)
  text = ''.join(f.read_text() for f in folder.glob(f'*-{ours}-*-final_bundles.txt')
                 if 'schedule-analysis' not in f.name) if ours else ''
  units = re.findall(r'\bvmatmul(?:\.mubr)?\.[a-z]+\d+', text)
  return dict(kernels=kernels, bundles=kernels.get(ours), spills=spills.get(ours),
              units={u: units.count(u) for u in sorted(set(units))})


if __name__ == '__main__':
  main(sys.argv[1])
