"""Each family against its original in transformers: see parity.py and rows/."""
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

from tests.interop.parity import CHECKS
from tests.interop.rows import ROWS

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')


# A row's checks follow each other, so that its model is made once.
@pytest.mark.parametrize('check', CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize('row', ROWS, ids=lambda r: r.id)
def test_family(row, check):
  check(row)
