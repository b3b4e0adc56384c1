"""Devices that are not there, for programs that are compiled ahead of time: see `lean-jax plan`."""
import importlib.util
import os
import re

from lean_jax.errors import InputError

# As the driver tells XLA of one H200 (SXM).
H200 = '''
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000  l2_cache_size: 62914560  clock_rate_ghz: 1.98
  device_memory_size: 150000000000  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
'''
# Bytes of a chip's memory: of TPUs the compiler knows by itself what a program may take.
MEMORY = {'TPU v4': 32 << 30, 'TPU v5 lite': 16 << 30, 'TPU v5': 95 << 30, 'TPU v6 lite': 32 << 30,
          'NVIDIA H200': 141_000_000_000}


def environment():
  """Sets what the compilers ask of the environment; before JAX is imported."""
  os.environ.update(
      JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
      TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1', CUDA_VISIBLE_DEVICES='-1')


def devices(name):
  """(devices, the platform to lower for) of a topology.

  Args:
    name: 'v5e:16x16', 'v6e:2x2', 'v5p:2x2x1', ... of TPUs, or 'h200' or 'h200:8'.

  Raises:
    InputError: there is none of that name, or its compiler is not installed.
  """
  from jax.experimental import topologies
  gpu = re.fullmatch(r'h200(?::(\d+))?', name)
  if not gpu and not re.fullmatch(r'(v\d+[ep]?|tpu\d+x):\d+x\d+(x\d+)?', name):
    raise InputError(f'no topology {name!r}; expected chips of a slice, as v5e:16x16, v6e:2x2, '
                     'v5p:2x2x1, or h200, h200:8')
  wanted = ('jax_cuda13_plugin', 'aot-gpu') if gpu else ('libtpu', 'aot')
  if importlib.util.find_spec(wanted[0]) is None:
    raise InputError(f"{name} is compiled for by {wanted[0]}, which is not installed; pip install "
                     f"'lean-jax[{wanted[1]}]'")
  platform = 'cuda' if gpu else 'tpu'
  how = dict(target_config=H200, topology=f'1x1x{gpu[1] or 1}') if gpu else dict(
      topology_name=name)
  try:
    return topologies.get_topology_desc(platform=platform, **how).devices, platform
  except Exception as error:                           # whatever a plugin raises
    said = ' '.join(str(error).split())[:200]
    raise InputError(f'no topology {name!r} for the compiler: {said}') from error
