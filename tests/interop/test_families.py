"""Each family against its original in transformers: see parity.py and rows/."""
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

from tests.interop.parity import CHECKS
from tests.interop.rows import ROWS

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')


# A row's checks follow each other in one process, so that its model is made once.
# What is the same code in each row of a family, its first one shows by default: what is saved, the
# cache, which each row's 32 generated tokens go through too, and of layers written out and bfloat16
# one, the next family the other.
ONCE = ('check_unrolled', 'check_bfloat16', 'check_save', 'check_cache')
FIRST = {row.family: row.id for row in reversed(ROWS)}
LATER = {family: ONCE[k % 2] for k, family in enumerate(FIRST)}


def by_default(row, name):
  return name not in ONCE or (FIRST[row.family] == row.id and LATER[row.family] != name)


CASES = [pytest.param(row, check, id=f'{row.id}-{check.__name__.removeprefix("check_")}',
                      marks=[pytest.mark.xdist_group(row.id),
                             *([] if by_default(row, check.__name__) else [pytest.mark.slow])])
         for row in ROWS for check in row.checks or CHECKS.values()]


@pytest.mark.parametrize(('row', 'check'), CASES)
def test_family(row, check):
  check(row)
