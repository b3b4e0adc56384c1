"""Figures of retrieval and the margin loss are those of other programs."""
import numpy as np
import pytest

from lean_jax.distillation.vectors import margin_mse
from lean_jax.evaluation.retrieval import metrics


def test_ndcg_is_that_of_scikit_learn():
  score = pytest.importorskip('sklearn.metrics').ndcg_score
  draw = np.random.default_rng(0)
  gains = draw.integers(0, 4, (6, 30)) * (draw.random((6, 30)) < .3)
  gains[:, 0] = 1
  scores = draw.normal(size=(6, 30))
  ranked = {q: list(np.argsort(-scores[q])) for q in range(6)}
  judged = {q: dict(enumerate(gains[q])) for q in range(6)}
  assert metrics(ranked, judged)['ndcg@10'] == pytest.approx(score(gains, scores, k=10))


def test_the_margin_loss_is_that_of_pytorch():
  torch = pytest.importorskip('torch')
  one, other, margin = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
  want = torch.nn.MSELoss()(torch.tensor(one) - torch.tensor(other), torch.tensor(margin))
  assert float(margin_mse(one, other, margin)) == pytest.approx(want.item(), rel=1e-6)
