"""The kind of device that a program is traced for, and what a TPU of that kind can do.

It is that of the mesh that is set (so that a program compiled ahead of time, for a topology, is
asked about its own chips), or of the default backend.
"""
import contextlib
import re

import jax

KINDS = ('TPU v4', 'TPU v5 lite', 'TPU v5', 'TPU v6 lite', 'TPU7x')
_ALSO = {'TPU v5e': 'TPU v5 lite', 'TPU v5p': 'TPU v5', 'TPU v6e': 'TPU v6 lite'}
_GPUS = dict(h100='NVIDIA H100', h200='NVIDIA H200')
_HOPPER = re.compile(r'NVIDIA G?H(100|200|800|20)\b')      # what has compute capability 9.0
_SHORT = dict(v4='TPU v4', v5e='TPU v5 lite', v5p='TPU v5', v6e='TPU v6 lite', tpu7x='TPU7x')


def kind():
  """'cpu', 'NVIDIA H200', 'TPU v5 lite', ..."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  found = jax.devices()[0].device_kind if device is None else device.device_kind
  return _ALSO.get(found, found)


def platform():
  """'cpu', 'tpu' or 'cuda': where a program that is traced now will run."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  found = jax.default_backend() if device is None else device.platform
  return dict(gpu='cuda').get(found, found)


def full_name(name):
  """'TPU v5 lite' of 'v5e' or of itself.

  Raises:
    ValueError: there is no such TPU.
  """
  found = (_SHORT | _ALSO).get(name, name)
  if found not in KINDS:
    raise ValueError(f'no TPU {name!r}; there are: {", ".join(_SHORT)}')
  return found


@contextlib.contextmanager
def target(name):
  """Programs traced inside are for one device of this kind: a TPU ('v5e' or 'TPU v5 lite'; see
  `full_name`), or an 'h100' or 'h200'.

  It counts in the caches of jax.jit, as a mesh does.
  """
  device = (jax.sharding.AbstractDevice(_GPUS[name], 1, 'gpu') if name in _GPUS else
            jax.sharding.AbstractDevice(full_name(name), 1, 'tpu'))
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    yield


def tpu():
  """The pltpu.TpuInfo of the TPU that a program is traced for; None if that is not one of KINDS.

  Its figures are of one core; a v4 and a v5p have two, which share a kernel's grid.
  """
  if platform() != 'tpu' or kind() not in KINDS:
    return None
  from jax.experimental.pallas import tpu as pltpu  # 0.3 s that a CPU has no use for
  return pltpu.get_tpu_info()


def why_no_int8():
  """None, or why the device has no units that multiply int8, in words that follow a form's name."""
  info = tpu()
  if info is None:
    return f'is for a TPU, and this program is for {kind()}'
  if not info.is_matmul_supported('int8', 'int8'):
    return f'needs units that multiply int8, which {kind()} has not'
  return None


def why_no_hopper():
  """None, or why the device is no NVIDIA Hopper, in words that follow a form's name."""
  if platform() == 'cuda' and _HOPPER.match(kind()):
    return None
  return f'is for an NVIDIA Hopper (H100, H200), and this program is for {kind()}'
