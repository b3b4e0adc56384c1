"""What is installed is what is there."""
import configparser
import importlib
import os
import pathlib

import pytest

import lean_jax
from lean_jax.version import __version__

ROOT = pathlib.Path(__file__).parents[1]


def test_setup_cfg_lists_every_package():
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  listed = set(config['options']['packages'].split())
  found = {'.'.join(p.parent.relative_to(ROOT).parts)
           for p in (ROOT / 'lean_jax').rglob('__init__.py')}
  found |= {'.'.join(('lean_jax', *p.relative_to(ROOT).parts))
            for p in (ROOT / 'kernels').iterdir() if p.is_dir() and list(p.glob('*.py'))}
  assert listed == found
  assert config['options']['packages'].split() == sorted(listed)


def test_kernels_are_ours_and_not_a_top_level_package():
  module = importlib.import_module('lean_jax.kernels.int8_matmul.api')
  assert pathlib.Path(module.__file__) == ROOT / 'kernels' / 'int8_matmul' / 'api.py'
  assert not (ROOT / 'kernels' / '__init__.py').exists()


def test_every_public_name_is_there():
  assert all(getattr(lean_jax, name) is not None for name in lean_jax.__all__)
  assert lean_jax.__version__ == __version__


@pytest.mark.skipif('PYTEST_XDIST_WORKER' not in os.environ, reason='tests run in one process')
def test_a_files_tests_run_in_one_process_of_several(request):
  """Or each process makes again what the tests of a file share, and the suite takes twice as long.
  """
  assert request.node.nodeid.endswith('@test_packaging.py')
