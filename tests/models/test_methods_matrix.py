"""Each family with each method: see methods_matrix.py."""
import pytest

from lean_jax.models.families import FAMILIES
from tests.models import methods_matrix as matrix


def test_every_family_is_here():
  assert set(matrix.CONFIGS) == set(FAMILIES)


# The methods of a family follow each other in one process, so that its model is made once.
@pytest.mark.parametrize('method', [*matrix.STEPS, 'distill'])
@pytest.mark.parametrize('family', [
    pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in matrix.CONFIGS])
def test_a_method_works_on_a_family(family, method):
  if method == 'distill':
    matrix.check_distill(family)
  else:
    matrix.check_method(family, method)
