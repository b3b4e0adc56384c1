"""lean_jax: large language models made lean, in JAX.

    import lean_jax as lean
    model = lean.load('DIR')
    model = lean.quantize(model, 'w4a16-g64')
    print(model.generate('Once upon a time'))
    lean.save(model, 'OUT')

The functions are those of `lean_jax.api`, imported when one is first used.
"""
import importlib
import importlib.util
from typing import TYPE_CHECKING

from lean_jax.errors import InputError as InputError
from lean_jax.errors import LeanError as LeanError
from lean_jax.version import __version__ as __version__

if TYPE_CHECKING:
  from lean_jax.api import *  # noqa: F403

_OWN = ('InputError', 'LeanError', '__version__')


def __getattr__(name):
  if name == '__all__':
    return sorted((*_OWN, *_api().__all__))
  if not (name.startswith('_') or _is_module(name)) and name in _api().__all__:
    return getattr(_api(), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted({*globals(), *_api().__all__})


def _is_module(name):
  """`from lean_jax import tree` asks here first, and is not to import all the rest."""
  return importlib.util.find_spec(f'{__name__}.{name}') is not None


def _api():
  return importlib.import_module('lean_jax.api')
