"""Each family with each method: see methods_matrix.py."""
import pytest

from lean_jax.models.families import FAMILIES
from tests.models import methods_matrix as matrix


def test_every_family_is_here():
  assert set(matrix.CONFIGS) == set(FAMILIES)


# The methods of a family follow each other in one process, so that its model is made once.
# One method of each family, another one for the next, runs by default, of those that take longest
# to compile one without training; all of them with -m ''.
METHODS = [*matrix.STEPS, 'distill']
LARGE = ('deepseek_v3', 'jamba', 'mixtral', 't5', 'gpt_oss')


def by_default(i, family, method):
  return method == ('w8a8', 'w4a16')[i % 2] if family in LARGE else method == METHODS[i % 6]


@pytest.mark.parametrize(('family', 'method'), [
    pytest.param(family, method, marks=[
        pytest.mark.xdist_group(family),
        *([] if by_default(i, family, method) else [pytest.mark.slow])])
    for i, family in enumerate(matrix.CONFIGS) for method in METHODS])
def test_a_method_works_on_a_family(family, method):
  if method == 'distill':
    matrix.check_distill(family)
  else:
    matrix.check_method(family, method)
