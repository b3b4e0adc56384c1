"""Each family against its original in transformers: see parity.py and rows/."""
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

from tests.interop.parity import CHECKS
from tests.interop.rows import ROWS

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')


# A row's checks follow each other in one process, so that its model is made once.
# What is the same code in each row of a family, its first one shows by default: layers written out,
# bfloat16, what is saved, and the cache, which each row's 32 generated tokens go through too.
ONCE = ('check_unrolled', 'check_bfloat16', 'check_save', 'check_cache')
FIRST = {row.family: row.id for row in reversed(ROWS)}
CASES = [pytest.param(row, check, id=f'{row.id}-{check.__name__.removeprefix("check_")}',
                      marks=[pytest.mark.xdist_group(row.id),
                             *([pytest.mark.slow] if check.__name__ in ONCE
                               and FIRST[row.family] != row.id else [])])
         for row in ROWS for check in row.checks or CHECKS.values()]


@pytest.mark.parametrize(('row', 'check'), CASES)
def test_family(row, check):
  check(row)
