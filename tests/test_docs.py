"""The pages of docs/ that scripts write are of the rows, schemes and ops that there are."""
import importlib.util
import pathlib
import re

from lean_jax.api.adapters import ADAPTERS
from lean_jax.kernels.native import library
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


def script(name):
  """The module of a script that writes a page."""
  spec = importlib.util.spec_from_file_location(f'{name}_page', DOCS / f'{name}.py')
  page = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(page)
  return page


def test_each_scheme_and_each_family_is_in_the_tables_of_quantization():
  page = script('quantization')
  _, formats, methods, families = (DOCS / 'quantization.md').read_text().split('\n## ')
  rows = lambda text: set(re.findall(r'^\| `?([^ `]+)`? \|', text, re.MULTILINE))
  assert {name for name in KNOWN if 'static' not in name} <= rows(formats)
  assert set(page.SCHEMES) <= rows(methods)
  assert set(page.METHODS) <= set(re.findall(r'\w+', methods))
  assert set(CONFIGS) <= rows(families) and ' fails ' not in families.split('| family')[1]


def test_what_is_said_to_run_of_each_op_is_what_runs():
  page, text = script('kernels'), (DOCS / 'kernels.md').read_text()
  ops = {p.parent.name for p in (DOCS.parent / 'kernels').glob('*/api.py')}
  assert set(page.CASES) == ops
  found = page.status()
  lines = set(text.splitlines())
  for op in ops:
    assert page.proof(op), op
    # of a CPU, if its kernels were built
    assert {row for row in page.section(op, found).splitlines()
            if not row.startswith('| CPU') or library.why_not() is None} <= lines, op
  for name in page.PLATFORMS:
    assert name in text
  assert text.count('\n## Figures') == 1 + len(page.MEASURED) - sum(
      not any(f'benchmarks/{s}' in f.read_text()
              for f in (DOCS.parent / 'benchmarks' / 'results').glob('*.md'))
      for s in page.MEASURED)


def test_each_loss_and_each_way_to_a_student_is_in_the_page_of_distillation():
  page, text = script('distillation'), (DOCS / 'distillation.md').read_text()
  found = set(re.findall(r'^\| `([^`]+)` \|', text, re.MULTILINE))
  assert set(page.LOSSES) <= found
  assert all(f'| {place} |' in text for place in page.PLACES)
  assert '**fails**' not in text


def test_each_adapter_is_in_its_page():
  page, text = script('adapt'), (DOCS / 'adapt.md').read_text()
  found = set(re.findall(r'^\| `([^`]+)` \|', text, re.MULTILINE))
  assert set(ADAPTERS) | {'bitfit'} == set(page.METHODS) == found
  assert all(f'| {place} |' in text for place in page.PLACES)
  assert '**fails**' not in text


def test_a_plan_that_is_made_again_leaves_the_rows_of_the_others(monkeypatch):
  page, text = script('scale'), (DOCS / 'scale.md').read_text()
  monkeypatch.setattr(page, 'versions', lambda *_: 'today')
  titles = [title for title, *_ in page.PLANS]
  made = page.tables(text)
  assert [list(rows) for _, rows in made] == [titles] * 3
  same = page.tables(page.page({}, text))
  assert same == made
  plan = dict(mesh=dict(fsdp=4), tokens=8, arguments=1 << 30, temporaries=0, total=1 << 30, limit=0,
              fits=False, operations=1e12, model_operations=1e12, replicated=[],
              collectives={'all-gather': (2, 1 << 30), 'collective-permute': (3, 1 << 30)})
  new = page.tables(page.page({titles[0]: plan}, text))
  for (_, rows), (_, before) in zip(new, made):
    assert [rows[t][:3] for t in titles[1:]] == [before[t][:3] for t in titles[1:]]
  sizes, talk, _ = new
  assert sizes[1][titles[0]] == [titles[0], 'fsdp 4', '8', '1.00', '0.00', '1.00', '-', 'no']
  assert talk[0][-1] == 'collective-permute:'
  assert dict(zip(talk[0], talk[1][titles[0]]))['collective-permute:'] == '3 (1.00)'
  assert talk[1][titles[1]][-1] == '-'
