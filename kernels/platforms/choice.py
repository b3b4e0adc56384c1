"""Which implementation of an op runs.

An op lists its forms, the fastest first. Without a name the first one that a platform has and that
takes these operands is the one of that platform, chosen when a program is lowered for it; with a
name it is that form, or an error that says why it cannot be.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax

from lean_jax.kernels.platforms import device

PLATFORMS = ('cpu', 'tpu', 'cuda')


class Form(NamedTuple):
  """An implementation of an op.

  Attributes:
    run: the function of the op's arrays.
    name: 'reference', 'xla', 'pallas' or 'native'; several forms of an op may share one.
    platforms: where it runs, of PLATFORMS.
    why_not: None, or why it does not take these operands, in words that follow its name.
    local: whether it needs its operands whole on one device: under a mesh that the compiler
      partitions over, it is then used inside of `jax.shard_map` only.
  """
  run: Callable
  name: str
  platforms: tuple = PLATFORMS
  why_not: str | None = None
  local: bool = False


def chosen(op, forms, implementation=None):
  """The function of the op's arrays that runs.

  Args:
    op: its name, for errors.
    forms: Forms, the fastest first; one without a name of its own platform serves all others.
    implementation: None, or the name of a form.

  Raises:
    ValueError: there is none of that name, or it does not run here.
  """
  if implementation is not None:
    return _named(op, forms, implementation)
  spread = partitioned()
  fit = [f for f in forms if f.why_not is None and f.name != 'reference'
         and not (f.local and spread)]
  each = {p: next(f for f in fit if p in f.platforms) for p in PLATFORMS}
  rest = next(f for f in fit if f.platforms == PLATFORMS)
  if all(f.run is rest.run for f in each.values()):
    return rest.run
  return lambda *args: lax.platform_dependent(
      *args, **{p: f.run for p, f in each.items()}, default=rest.run)


def partitioned():
  """Whether a mesh of several devices is set whose programs the compiler partitions."""
  mesh = jax.sharding.get_abstract_mesh()
  return any(size > 1 and kind != jax.sharding.AxisType.Manual
             for size, kind in zip(mesh.axis_sizes, mesh.axis_types))


def _named(op, forms, name):
  of = [f for f in forms if f.name == name]
  if not of:
    raise ValueError(f'{op} has no implementation {name!r}; there are: '
                     f'{", ".join(dict.fromkeys(f.name for f in forms))}')
  here = device.platform()
  able = [f for f in of if here in f.platforms and f.why_not is None]
  if able:
    return able[0].run
  why = next((f.why_not for f in of if here in f.platforms), None) or (
      f'runs on {" and ".join(p for f in of for p in f.platforms)}, and this is {here}')
  others = dict.fromkeys(f.name for f in forms if here in f.platforms and f.why_not is None)
  raise ValueError(f'{op}, implementation {name!r}: {why}; here there are: {", ".join(others)}')
