"""The report: what is on the front, and what the tables hold."""
import pytest

from lean_jax.errors import InputError
from lean_jax.report.pareto import pareto, pareto_front
from lean_jax.report.table import COLUMNS, markdown_report, markdown_table


def variant(name, size, quality, **more):
  return dict(name=name, parameters=10, bytes=size, perplexity=quality, bits_per_byte=1.,
              prefill_tokens_per_second=1., decode_tokens_per_second=1., peak_memory_bytes=1,
              train_seconds=0.) | more


VARIANTS = [variant('a', 100, 5.), variant('b', 50, 6., domain_perplexity=7.), variant('c', 60, 9.)]


def test_the_front_is_what_no_other_beats_in_both():
  assert pareto_front([(100, 5.), (50, 6.), (60, 9.), (100, 5.)]) == [0, 1, 3]


def test_the_picture_labels_every_variant():
  figure = pareto(VARIANTS)
  labels = [t.get_text() for t in figure.axes[0].texts]
  assert sorted(labels) == ['a', 'b', 'c']
  with pytest.raises(InputError, match='at least one'):
    pareto([])


def test_the_markdown_has_a_row_a_variant_and_says_what_failed():
  lines = markdown_table(VARIANTS).splitlines()
  assert len(lines) == 2 + len(VARIANTS)
  assert all(line.count('|') == len(COLUMNS) + 1 for line in lines)
  report = dict(variants=VARIANTS, settings={}, versions=dict(jax='1'),
                claims=[dict(name='holds', figures={'a.x': 1.5}, passed=True),
                        dict(name='does not', figures={}, passed=False)],
                sample=dict(variant='a', text='text'))
  text = markdown_report(report)
  assert '| holds | a.x 1.5 | pass |' in text and '| does not |  | **FAIL** |' in text
