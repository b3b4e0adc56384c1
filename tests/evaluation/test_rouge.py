"""ROUGE-L against all subsequences tried, and its F1 by hand."""
import itertools

import numpy as np
import pytest

from lean_jax.evaluation.rouge import common, rouge_l


def test_the_longest_common_subsequence_is_found_by_trying_all():
  draw = np.random.default_rng(0)

  def tried(a, b):
    within = lambda part, rest: all(any(x == y for y in rest) for x in part)
    return max(n for n in range(len(b) + 1)
               if any(within(part, iter(a)) for part in itertools.combinations(b, n)))
  for _ in range(40):
    a, b = (draw.integers(0, 4, length).tolist() for length in draw.integers(0, 8, 2))
    assert common(a, b) == tried(a, b)


def test_the_best_reference_counts():
  assert rouge_l('abcx', ['zzz', 'abzxy']) == pytest.approx(2 * 3 / (4 + 5))
  assert rouge_l('abcx', ['zzz']) == rouge_l([], [[]]) == 0
  assert rouge_l('abcx', ['zzz', 'abcx']) == 1
