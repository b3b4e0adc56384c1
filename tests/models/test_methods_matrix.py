"""Each family with each method: see methods_matrix.py."""
import pytest

from lean_jax.models.families import FAMILIES
from tests.models import methods_matrix as matrix


def test_every_family_is_here():
  assert set(matrix.CONFIGS) == set(FAMILIES)


# Of lora there is nothing that qlora, the same over rounded weights, does not run too.
METHODS = [pytest.param(m, marks=[pytest.mark.slow] if m == 'lora' else [])
           for m in (*matrix.STEPS, 'distill')]


# The methods of a family follow each other in one process, so that its model is made once.
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('family', [
    pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in matrix.CONFIGS])
def test_a_method_works_on_a_family(family, method):
  if method == 'distill':
    matrix.check_distill(family)
  else:
    matrix.check_method(family, method)
