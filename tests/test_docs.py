"""docs/models.md and docs/quantization.md are of the rows, families and schemes that there are."""
import importlib.util
import pathlib
import re

from lean_jax.models.families import FAMILIES
from lean_jax.quantization.spec import KNOWN
from tests.interop.rows import ROWS
from tests.models.methods_matrix import CONFIGS

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
TEXT = (DOCS / 'models.md').read_text()


def test_each_row_of_the_parity_tests_is_in_the_table_and_none_fails():
  found = set(re.findall(r'^\| (\S+) \| (.*?) \| (\w+) \|', TEXT, re.MULTILINE))
  assert {(row.family, row.what, row.model) for row in ROWS} <= found
  assert 'fails' not in TEXT


def test_each_family_is_in_the_table_of_methods():
  methods = TEXT.split('## Methods')[1]
  found = set(re.findall(r'^\| (\S+) \|', methods, re.MULTILINE))
  assert set(CONFIGS) <= found
  assert set(FAMILIES) <= found


def test_each_scheme_and_each_family_is_in_the_tables_of_quantization():
  spec = importlib.util.spec_from_file_location('quantization_page', DOCS / 'quantization.py')
  page = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(page)
  _, formats, methods, families = (DOCS / 'quantization.md').read_text().split('\n## ')
  rows = lambda text: set(re.findall(r'^\| `?([^ `]+)`? \|', text, re.MULTILINE))
  assert {name for name in KNOWN if 'static' not in name} <= rows(formats)
  assert set(page.SCHEMES) <= rows(methods)
  assert set(page.METHODS) <= set(re.findall(r'\w+', methods))
  assert set(CONFIGS) <= rows(families) and ' fails ' not in families.split('| family')[1]
