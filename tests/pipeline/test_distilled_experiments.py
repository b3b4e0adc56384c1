"""The experiments on architectures, retrieval and federated clients say what fails."""
import copy

import pytest

from lean_jax.experiments import distill_architectures, federated, retrieval

FIGURES = {
    distill_architectures: dict(
        {kind: [dict(text=5., distilled=4.)] * 3 for kind in ('mamba', 'lean_lstm', 'born again')},
        teacher=3.),
    federated: {f'seed {k}': {name: dict(alone=5., federated=4.) for name in federated.MODELS}
                for k in range(3)},
    retrieval: dict(
        teacher={'spearman': .8672, 'ndcg@10': .4, 'recall@100': .8},
        cut={'spearman': .7, 'ndcg@10': .3, 'recall@100': .7},
        students=[{'spearman': .85, 'ndcg@10': .39, 'recall@100': .79}] * 3)}


@pytest.mark.parametrize(('experiment', 'path', 'value', 'fails'), [
    (distill_architectures, ('teacher',), 9., 0),
    (distill_architectures, ('mamba', 1, 'distilled'), 5.1, 1),
    (distill_architectures, ('born again', 2, 'distilled'), float('nan'), 1),
    (federated, ('seed 0', 'lstm', 'alone'), 6., 0),
    (federated, ('seed 2', 'mamba', 'alone'), 3., 1),
    (retrieval, ('cut', 'spearman'), .6, 0), (retrieval, ('teacher', 'spearman'), .82, 1),
    (retrieval, ('students', 2, 'ndcg@10'), .31, 1),
    (retrieval, ('students', 0, 'spearman'), .6, 2)])
def test_a_claim_holds_or_fails_by_its_figures(experiment, path, value, fails):
  found = copy.deepcopy(FIGURES[experiment])
  at = found
  for key in path[:-1]:
    if isinstance(at[key], list):
      at[key] = [dict(x) for x in at[key]]
    at = at[key]
  at[path[-1]] = value
  assert [passed for _, passed in experiment.claims(found)].count(False) == fails
