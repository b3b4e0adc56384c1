"""The compiled kernels; everything else about the package is in setup.cfg."""
import importlib.util
import pathlib
import sys

from setuptools import Extension, setup


def extensions():
  """The one extension, where the headers of XLA are there; a failing compiler fails no install."""
  found = importlib.util.find_spec('jaxlib')
  if found is None or sys.platform == 'win32':
    return []
  return [Extension(
      'lean_jax.kernels.native._lean', ['kernels/native/lean_kernels.cc'],
      depends=[f'kernels/native/{name}.h' for name in ('amx', 'avx512', 'portable', 'weights')],
      include_dirs=[str(pathlib.Path(found.origin).with_name('include'))],
      extra_compile_args=['-std=c++17', '-O3', '-DNDEBUG', '-w', '-g0'], optional=True)]


setup(ext_modules=extensions())
