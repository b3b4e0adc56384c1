"""Memory that XLA:CPU need not ask the system for again at every step."""
import ctypes
import sys

# Names of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_heap():
  """Makes glibc keep freed memory for this whole process, to be called before jax starts.

  XLA:CPU takes the memory of each step's temporaries anew; fresh from the system, its pages cost a
  sixth of a small model's training step (benchmarks/train_step.py). A command may decide that for
  its process; a library may not, so nothing else calls this. Elsewhere than on glibc it does
  nothing.
  """
  if not sys.platform.startswith('linux'):
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is not None:
    for name, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2 ** 31 - 1)):
      mallopt(name, value)
