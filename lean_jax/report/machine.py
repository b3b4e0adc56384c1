"""What a machine runs programs with."""
import platform

import jax

from lean_jax.kernels.native import library
from lean_jax.version import __version__


def machine():
  """{what: which}: versions, devices, and which kernels make products of few bits on a CPU."""
  why = library.why_not()
  return dict(
      lean_jax=__version__, python=platform.python_version(), jax=jax.__version__,
      devices=', '.join(sorted({f'{d.platform} ({d.device_kind})' for d in jax.devices()})),
      native_kernels=library.level() if why is None else f'none, XLA in their place: {why}')
