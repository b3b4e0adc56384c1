"""The notebooks are their sources, and run from top to bottom."""
import os
import pathlib
import subprocess
import sys

import pytest

from tests.xla import QUICK

COLAB = pathlib.Path(__file__).parents[2] / 'colab'
SOURCES = sorted(COLAB.glob('*.py'))
LONG = ('distill', 'qlora')                 # over 45 CPU-seconds each at their tiny size


def cells(notebook):
  return [(c.cell_type, c.source) for c in notebook.cells]


@pytest.mark.parametrize('source', SOURCES, ids=lambda p: p.stem)
def test_a_notebook_is_its_source(source):
  jupytext = pytest.importorskip('jupytext')
  assert cells(jupytext.read(source)) == cells(jupytext.read(source.with_suffix('.ipynb')))


@pytest.mark.parametrize('source', [
    pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in LONG)) for p in SOURCES])
def test_a_notebook_runs_from_top_to_bottom(source, tmp_path):
  pytest.importorskip('nbmake')
  environment = dict(os.environ, LEAN_JAX_SIZE='tiny', TMPDIR=str(tmp_path), 
                     XLA_FLAGS=QUICK)
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '--nbmake', '--nbmake-timeout=600', '-q', '-p',
       'no:cacheprovider', '--rootdir', str(tmp_path), '-c', os.devnull,
       str(source.with_suffix('.ipynb'))],
      env=environment, cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-4000:]
