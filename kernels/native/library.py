"""The compiled kernels, as targets that XLA:CPU calls."""
import ctypes
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.quantization import layouts

TARGETS = dict(lean_integer='LeanInteger', lean_floating='LeanFloating')
LEVELS = ('C++', 'AVX2', 'AVX512-VNNI', 'AMX')


@functools.cache
def opened():
  """(library, None), its targets registered, or (None, why there is none)."""
  found = sorted(pathlib.Path(__file__).parent.glob('_lean*.so'))
  if not found:
    return None, ('was not built: where lean_jax was installed no C++ compiler was found; install '
                  'one, and lean_jax again')
  why = None
  for path in found:            # of several versions of Python; none of them asks which
    try:
      library = ctypes.CDLL(str(path))
      for target, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)),
                                    platform='cpu')
      return library, None
    except Exception as error:  # whatever it is, products are then XLA's
      why = f'does not load ({path.name}: {error}); install lean_jax again'
  return None, why


def why_not():
  """None, or why the native kernels do not run, in words that follow their name."""
  return opened()[1]


def why_not_layout(layout):
  """None, or why they do not take a layout of `quantization.layouts`, or do not run."""
  if layout not in ('packed', 'panels'):
    return f"takes layouts 'packed' and 'panels', and this is {layout!r}"
  if layout == 'panels' and why_not() is None and not takes_panels():
    return f"takes layout 'panels' with AVX512-VNNI, and this CPU has {level()}"
  return why_not()


def product(target, x, values, scale, sizes, level, *more, **how):
  """[*E M N] float32, of a target's product; see the functions in kernels/*/cpu.py.

  Args:
    x: [*E M K]; with sizes [E] all rows are one matrix [M K], and values have one axis E.
    values: [*E rows N], or [*E N/64 quads 256] in layout 'panels'.
    scale: [*E G N] or [*E G 1].
    more: the target's other arrays.
  """
  *batch, M, K = x.shape
  E = len(batch) if sizes is None else 1
  flat = lambda a: a.reshape(-1, *a.shape[E:])
  N = values.shape[-1] if values.ndim == E + 2 else values.shape[-3] * layouts.PANEL
  x = x.reshape(-1, M, K).astype(jnp.float32)
  sizes = jnp.zeros(0, jnp.int32) if sizes is None else sizes.astype(jnp.int32)
  y = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((x.shape[0], M, N), jnp.float32),
                       vmap_method='sequential')(x, flat(values), flat(scale), *more, sizes,
                                                 level=np.int64(level), **how)
  return y.reshape(*batch, M, N)


def takes_panels(most=-1):
  """Whether this CPU has the instructions of the products with layout 'panels'.

  Args:
    most: index of the highest of `LEVELS` that they may use; -1 is all that there is.
  """
  if why_not() is not None:
    return False
  there = LEVELS.index(level())
  return (there if most < 0 else min(there, most)) >= LEVELS.index('AVX512-VNNI')


def level():
  """What instructions they use on this CPU, of LEVELS.

  Raises:
    ValueError: they do not run here.
  """
  library, why = opened()
  if library is None:
    raise ValueError(f'the native kernels: {why}')
  return LEVELS[library.LeanLevel()]
