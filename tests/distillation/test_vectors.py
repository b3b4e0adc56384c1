"""Distillation of encoders: students' vectors, similarities and margins follow their teachers'."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.distillation import vectors
from lean_jax.nn.pooling import Pooling

WORDS = ('quick', 'brown', 'fox', 'jumps', 'over', 'lazy', 'dog', 'the')
BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=64)


@pytest.fixture(scope='module')
def teacher(tiny_model):
  model = lean.create('bert', tiny_model.tokenizer, seed=1, **BERT)
  return dataclasses.replace(model, config=dataclasses.replace(
      model.config, pooling=Pooling(normalize=True)))


def texts(count, seed=0):
  draw = np.random.default_rng(seed)
  return [' '.join(draw.choice(WORDS, 4)) for _ in range(count)]


def test_similarities_and_margins_are_their_equations_in_float64():
  draw = np.random.default_rng(0)
  x, y = draw.normal(size=(5, 3)), draw.normal(size=(5, 7))
  unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)
  log = lambda s: s - np.log(np.exp(s).sum(axis=1, keepdims=True))
  own = lambda a: (unit(a) @ unit(a).T / .1)[~np.eye(5, dtype=bool)].reshape(5, 4)
  p, q = log(own(y)), log(own(x))
  want = np.mean(np.sum(np.exp(p) * (p - q), axis=1))
  found = vectors.similarity_kl(jnp.float32(x), jnp.float32(y), temperature=.1)
  assert float(found) == pytest.approx(want, rel=1e-4)
  a, b, m = draw.normal(size=(3, 6))
  assert float(vectors.margin_mse(*map(jnp.float32, (a, b, m)))) == pytest.approx(
      np.mean((a - b - m) ** 2), rel=1e-5)
  W = draw.normal(size=(3, 7))
  assert float(vectors.vector_mse(*map(jnp.float32, (x, y, W)))) == pytest.approx(
      np.mean((x @ W - y) ** 2), rel=1e-5)
  cosine = 1 - np.mean(np.sum(unit(x @ W) * unit(y), axis=1))
  assert float(vectors.vector_cosine(*map(jnp.float32, (x, y, W)))) == pytest.approx(
      cosine, rel=1e-4)


def test_teachers_have_no_gradient():
  x, y = jax.random.normal(jax.random.key(0), (2, 4, 3))
  for f in vectors.KINDS.values():
    grads = jax.grad(f, argnums=(0, 1))(x, y)
    assert jnp.abs(grads[0]).max() > 0 and jnp.abs(grads[1]).max() == 0


def test_half_the_layers_learn_the_vectors(teacher, tmp_path):
  told = dict(steps=40, batch=16, peak=2e-3, workdir=tmp_path / 'run', group_by_length=True)
  before = lean.distill_encoder(teacher, texts(16), steps=1, batch=16, peak=1e-9)
  student = lean.distill_encoder(teacher, texts(96), **told)
  assert student.config.layers == 1 and student.config.pooling.normalize
  held = texts(32, seed=1)
  far = lambda m: 1 - (m.embed(held) * teacher.embed(held)).sum(axis=1).mean()
  assert far(student) < .3 * far(before)
  again = lean.distill_encoder(teacher, texts(96), **told)             # resumes, and is over
  np.testing.assert_array_equal(again.embed(held), student.embed(held))


@pytest.mark.slow
def test_a_narrower_student_learns_through_a_matrix_that_is_not_its_own(teacher):
  narrow = lean.create('bert', teacher.tokenizer, **BERT | dict(hidden_size=16))
  seen = []
  losses = [dict(kind='cosine'), dict(kind='similarity_kl', weight=.5, temperature=.1)]
  student = lean.distill_encoder(
      teacher, texts(64), student=narrow, losses=losses, steps=40, batch=16, peak=3e-3,
      hooks=(lambda step, metrics: seen.append({k: float(v) for k, v in metrics.items()}),))
  for name in ('cosine', 'similarity_kl'):
    assert seen[-1][name] < .6 * seen[0][name], name
  assert student.params.keys() == narrow.params.keys()
  assert student.embed(['a fox']).shape == (1, 16)


def test_a_bi_encoder_learns_the_order_of_a_cross_encoder(teacher):
  ranker = lean.add_classifier(teacher, ['score'], seed=3)
  student = dataclasses.replace(teacher, config=dataclasses.replace(teacher.config, pooling=None))
  triples = list(zip(texts(48, 2), texts(48, 3), texts(48, 4)))
  score = lambda side: ranker.classify([(t[0], t[side]) for t in triples])[:, 0]
  margins = score(1) - score(2)
  seen = []
  learn = lambda given: lean.distill_ranker(
      given, student, triples, steps=30, batch=16, peak=1e-3, scale=2.,
      hooks=(lambda step, metrics: seen.append(float(metrics['loss'])),))
  learned = learn(ranker)
  q, p, n = (learned.embed(side) for side in zip(*triples))
  after = np.mean(((q * p).sum(1) - (q * n).sum(1) - 2 * margins) ** 2)
  assert after < .3 * seen[0], (after, seen[0])
  first = len(seen)
  learn(margins)                                                       # the same, said otherwise
  np.testing.assert_allclose(seen[first:], seen[:first], rtol=1e-3)


@pytest.mark.parametrize(('losses', 'message'), [
    ([dict(kind='l1')], 'kind: mse, cosine, similarity_kl'), ([], 'one or more'),
    ([dict(kind='mse', temperature=1.)], "mse has no 'temperature'"),
    ([dict(kind='similarity_kl', temperature=0)], 'above 0'), ([dict(kind='mse')] * 2, 'once')])
def test_losses_that_are_none_are_refused(teacher, losses, message):
  with pytest.raises(lean.InputError, match=message):
    lean.distill_encoder(teacher, texts(4), steps=1, batch=2, losses=losses)


def test_triples_that_do_not_fit_are_refused(teacher):
  with pytest.raises(lean.InputError, match='relevant text, another'):
    lean.distill_ranker([], teacher, [], steps=1)
  with pytest.raises(lean.InputError, match='margins of shape'):
    lean.distill_ranker([1., 2.], teacher, [('a', 'b', 'c')], steps=1)
  with pytest.raises(lean.InputError, match='give a classifier of pairs with one'):
    lean.distill_ranker(teacher, teacher, [('a', 'b', 'c')], steps=1)
