"""Eight virtual CPU devices, and no silent rank promotion, for every test."""
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '')
                           + ' --xla_force_host_platform_device_count=8')

import pathlib

import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def real_data():
  """The folder of real data that LEAN_JAX_DATA names; without it the test skips."""
  folder = os.environ.get('LEAN_JAX_DATA')
  if not folder:
    pytest.skip('LEAN_JAX_DATA is not set')
  return pathlib.Path(folder)
