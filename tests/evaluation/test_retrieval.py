"""Recall, nDCG and MRR are those of their definitions; Cranfield is read whole."""
import math

import numpy as np
import pytest

import lean_jax as lean
from lean_jax.evaluation.retrieval import cranfield, metrics, ranked_by_vectors


def test_figures_of_a_case_done_by_hand():
  found = metrics(dict(a=['x', 'y', 'z'], b=['x', 'y', 'z'], c=['z']),
                  dict(a=dict(y=2, z=1), b=dict(w=1, x=0), c=dict(x=0)), cuts=(2, 3))
  ndcg = (2 / math.log2(3)) / (2 / math.log2(2) + 1 / math.log2(3))
  assert found == pytest.approx({'recall@2': (1 / 2 + 0) / 2, 'recall@3': (1 + 0) / 2,
                                 'ndcg@2': ndcg / 2, 'mrr@2': (1 / 2) / 2, 'queries': 2})


def test_figures_are_those_of_loops_over_ranks():
  draw = np.random.default_rng(0)
  ranked = {q: [str(d) for d in draw.permutation(40)] for q in range(12)}
  judged = {q: {str(d): int(draw.integers(0, 4)) for d in draw.choice(40, 9, replace=False)}
            for q in range(12)}
  found, sums = metrics(ranked, judged, cuts=(10, 20)), dict(recall=0., ndcg=0., mrr=0.)
  for q in range(12):
    gains = [judged[q].get(d, 0) for d in ranked[q]]
    total = sum(g > 0 for g in judged[q].values())
    sums['recall'] += sum(g > 0 for g in gains[:20]) / total
    dcg = sum(g / math.log2(rank + 1) for rank, g in enumerate(gains[:10], 1))
    best = sum(g / math.log2(rank + 1) for rank, g in enumerate(
        sorted(judged[q].values(), reverse=True)[:10], 1))
    sums['ndcg'] += dcg / best
    sums['mrr'] += next((1 / r for r, g in enumerate(gains[:10], 1) if g > 0), 0)
  assert found['recall@20'] == pytest.approx(sums['recall'] / 12)
  assert found['ndcg@10'] == pytest.approx(sums['ndcg'] / 12)
  assert found['mrr@10'] == pytest.approx(sums['mrr'] / 12)


def test_documents_are_ranked_by_products_and_ties_stay_in_order():
  places = ranked_by_vectors(np.eye(2), np.array([[0, 1.], [1, 0], [1, 0], [2, 0]]), 3)
  np.testing.assert_array_equal(places, [[3, 1, 2], [0, 1, 2]])


def test_a_query_finds_itself(tiny_model):
  queries = dict(one='the quick fox', two='lazy dog jumps')
  found = lean.evaluate_retrieval(tiny_model, queries, dict(queries, other='over brown'),
                                  {q: {q: 1} for q in queries})
  assert found['queries'] == 2 and found['recall@10'] == 1
  with pytest.raises(lean.InputError, match="'gone' is not among the texts"):
    lean.evaluate_retrieval(tiny_model, queries, queries, dict(one=dict(gone=1)))


def test_judgements_that_judge_nothing_are_refused():
  with pytest.raises(lean.InputError, match='no query has a relevant'):
    metrics(dict(a=['x']), dict(a=dict(x=0)))
  with pytest.raises(lean.InputError, match='judged and not ranked'):
    metrics({}, dict(a=dict(x=1)))


def test_cranfield_is_read_whole(real_data):
  queries, documents, judged = cranfield(real_data / 'cranfield')
  assert len(queries) == len(judged) == 225
  assert 1398 <= len(documents) <= 1400
  assert documents['1'].startswith('experimental investigation of the aerodynamics of a wing in a '
                                   'slipstream . an experimental study')
  assert queries['3'].startswith('what problems of heat conduction')    # .I 004: the third of them
  assert judged['1']['184'] == 1 and '486' not in judged['1']


def test_a_folder_without_cranfield_is_refused(tmp_path):
  with pytest.raises(lean.InputError, match='cran.all.1400'):
    cranfield(tmp_path)
