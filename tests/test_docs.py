"""docs/models.md is what docs/models.py wrote of the rows and families that there are."""
import pathlib
import re

from lean_jax.models.families import FAMILIES
from tests.interop.rows import ROWS
from tests.models.methods_matrix import CONFIGS

TEXT = (pathlib.Path(__file__).parents[1] / 'docs' / 'models.md').read_text()


def test_each_row_of_the_parity_tests_is_in_the_table_and_none_fails():
  found = set(re.findall(r'^\| (\S+) \| (.*?) \| (\w+) \|', TEXT, re.MULTILINE))
  assert {(row.family, row.what, row.model) for row in ROWS} <= found
  assert 'fails' not in TEXT


def test_each_family_is_in_the_table_of_methods():
  methods = TEXT.split('## Methods')[1]
  found = set(re.findall(r'^\| (\S+) \|', methods, re.MULTILINE))
  assert set(CONFIGS) <= found
  assert set(FAMILIES) <= found
