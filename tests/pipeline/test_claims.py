"""Claims: they pass and fail by their figures, and a failure is said."""
import json
import math

import pytest

from lean_jax import cli
from lean_jax.errors import InputError
from lean_jax.pipeline.claims import check

VARIANTS = [dict(name='a', perplexity=10., digest='x'), dict(name='b', perplexity=11., digest='x')]
CLAIM = dict(name='a beats b', left='a.perplexity', right='b.perplexity', bound=1.)


@pytest.mark.parametrize(('change', 'passed'), [
    ({}, True), (dict(left='b.perplexity', right='a.perplexity'), False),
    (dict(right='a.perplexity'), False), (dict(bound=.9), False),
    (dict(left='b.perplexity', right='a.perplexity', bound=1.2), True),
    (dict(left='a.digest', right='b.digest', equal=True), True),
    (dict(left='a.perplexity', right='b.perplexity', equal=True), False)])
def test_a_claim_is_left_below_bound_times_right(change, passed):
  found = check([CLAIM | change], VARIANTS)[0]
  assert found['passed'] is passed
  assert set(found) == {'name', 'figures', 'passed'}


def test_a_nan_fails():
  assert not check([CLAIM], [dict(name='a', perplexity=math.nan), VARIANTS[1]])[0]['passed']


@pytest.mark.parametrize('left', ['c.perplexity', 'a.speed', 'a'])
def test_a_claim_on_what_was_not_measured_is_refused(left):
  with pytest.raises(InputError, match='claim on'):
    check([CLAIM | dict(left=left)], VARIANTS)


def test_a_failed_claim_is_printed_and_is_the_exit_code(monkeypatch, capsys, tmp_path):
  report = dict(variants=[], sample=dict(variant='a', text=''), settings={}, versions={},
                claims=[dict(name='a beats b', figures={}, passed=False)])
  monkeypatch.setattr('lean_jax.pipeline.run.run', lambda *_, **__: report)
  code = cli.main(['demo', '--json', f'--workdir={tmp_path}'])
  captured = capsys.readouterr()
  assert code == 1
  assert '1 of 1 claims failed: a beats b' in captured.err
  assert json.loads(captured.out) == report
