"""Losses on taps against their papers' formulas in float64, with masks."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.distillation.attention import attention_kl, attention_mse, relation_kl
from lean_jax.distillation.cka import cka
from lean_jax.distillation.hidden import hidden_cosine, hidden_mse
from lean_jax.distillation.layers import layer_map
from lean_jax.distillation.schedules import schedule
from lean_jax.errors import InputError
from lean_jax.nn.attention import HIDDEN

B, T, D, E, H = 2, 5, 6, 4, 3
DRAW = np.random.default_rng(0)
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
X, Y = DRAW.normal(size=(B, T, D)), DRAW.normal(size=(B, T, E))
W = DRAW.normal(size=(D, E))
CAUSAL = np.tril(np.ones((T, T), bool))[None, None] & REAL[:, None, None]
SCORES = [np.where(CAUSAL, 2 * DRAW.normal(size=(B, H, T, T)), HIDDEN) for _ in range(2)]
HEADS = DRAW.normal(size=(B, T, 6, 2)), DRAW.normal(size=(B, T, 2, 9))    # joined: 12 and 18 wide
TOKENS = [(b, t) for b in range(B) for t in range(T) if REAL[b, t]]


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def kl(p, q):
  return np.sum(p * np.log(p / q))


def mse64():
  return np.mean([(X[at] @ W - Y[at]) ** 2 for at in TOKENS])


def cosine64():
  pairs = [(X[at] @ W, Y[at]) for at in TOKENS]
  return np.mean([1 - x @ y / np.sqrt(x @ x * (y @ y)) for x, y in pairs])


def cka64():
  x, y = (np.stack([z[at] for at in TOKENS]) for z in (X, Y))
  n = len(x)
  K, L, C = x @ x.T, y @ y.T, np.eye(n) - 1 / n             # HSIC of linear kernels, section 3
  hsic = lambda K, L: np.trace(K @ C @ L @ C) / (n - 1) ** 2
  return 1 - hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


def scores64(each):
  """The mean of a function of the scores of the keys that a query sees, over heads and tokens."""
  rows = [[s[b, h, t][CAUSAL[b, 0, t]] for s in SCORES] for b, t in TOKENS for h in range(H)]
  return each(rows)


def relations64(heads):
  total = []
  for b in range(B):
    for a in range(heads):
      p, q = ([softmax(r) for r in x @ x.T / np.sqrt(x.shape[1])] for x in (
          z[b].reshape(T, heads, -1)[REAL[b], a] for z in reversed(HEADS)))
      total += map(kl, p, q)
  return np.mean(total)


LOSSES = dict(
    hidden_mse=(lambda x, y: hidden_mse(x, y, REAL, jnp.asarray(W, 'f4')), X, Y, mse64),
    hidden_cosine=(lambda x, y: hidden_cosine(x, y, REAL, jnp.asarray(W, 'f4')), X, Y, cosine64),
    cka=(lambda x, y: cka(x, y, REAL), X, Y, cka64),
    attention_mse=(lambda x, y: attention_mse(x, y, REAL), *SCORES, lambda: scores64(
        lambda rows: np.mean(np.concatenate([(s - t) ** 2 for s, t in rows])))),
    attention_kl=(lambda x, y: attention_kl(x, y, REAL), *SCORES, lambda: scores64(
        lambda rows: np.mean([kl(softmax(t), softmax(s)) for s, t in rows]))),
    relation_kl_1=(lambda x, y: relation_kl(x, y, REAL, 1), *HEADS, lambda: relations64(1)),
    relation_kl_6=(lambda x, y: relation_kl(x, y, REAL, 6), *HEADS, lambda: relations64(6)))


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_is_its_papers_formula_in_float64(name):
  loss, x, y, want = LOSSES[name]
  got = loss(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
  np.testing.assert_allclose(got, want(), rtol=5e-6)      # float32, some dozens of terms


@pytest.mark.parametrize('name', LOSSES)
def test_gradients_reach_real_tokens_of_the_student_alone(name):
  loss, x, y, _ = LOSSES[name]
  grads = jax.grad(loss, (0, 1))(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
  one, other = map(np.asarray, grads)
  assert not other.any() and np.isfinite(one).all()
  if one.shape[:2] == (B, T):
    assert not one[~REAL].any() and (np.abs(one[REAL]).max(-1) > 0).all()
  else:
    assert not one[~np.broadcast_to(CAUSAL & REAL[:, None, :, None], one.shape)].any()
    assert one.any()


@pytest.mark.parametrize('name', LOSSES)
def test_a_student_like_its_teacher_has_no_loss(name):
  loss, x, _, _ = LOSSES[name]
  if name.startswith('hidden'):
    loss = lambda x, y: dict(hidden_mse=hidden_mse, hidden_cosine=hidden_cosine)[name](x, y, REAL)
  x = jnp.asarray(x, jnp.float32)
  assert abs(float(loss(x, x))) < 1e-6


def test_cka_is_blind_to_rotations_and_scales_and_features_without_variance_are_no_nan():
  turn = np.linalg.qr(W @ W.T + np.eye(D))[0]
  x = jnp.asarray(X, jnp.float32)
  assert abs(float(cka(x, jnp.asarray(3 * X @ turn, jnp.float32), REAL))) < 1e-5
  value, grad = jax.value_and_grad(cka)(jnp.ones((B, T, D)), x, REAL)
  assert float(value) == 1 and bool(jnp.isfinite(grad).all())


def test_layer_maps_are_those_of_the_papers():
  assert layer_map('uniform', 4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))      # TinyBERT's 3 m
  assert layer_map('last', 4, 12) == ((0, 8), (1, 9), (2, 10), (3, 11))
  assert layer_map('last-1', 4, 12) == ((3, 11),)
  assert layer_map([[0, 3], [1, 3]], 2, 4) == ((0, 3), (1, 3))


@pytest.mark.parametrize('given', ['uniform', 'last', 'last-3', 'last-0', 'first', [], [[0, 2]],
                                   [[-1, 0]], [[4, 0]], [[0]], [0, 1], 3, [[0, True]]])
def test_layers_that_there_are_not_are_refused(given):
  with pytest.raises(InputError, match='student of 4 and a teacher of 2.*0 to 3 and 0 to 1'):
    layer_map(given, 4, 2)


def test_schedules_go_from_start_to_end_and_stay():
  for kind, half in (('linear', 2.), ('cosine', 2.)):
    at = schedule(dict(kind=kind, start=3., end=1., steps=10), 'weight')
    np.testing.assert_allclose([at(s) for s in (0, 5, 10, 50)], [3, half, 1, 1], rtol=1e-6)
  quarter = schedule(dict(kind='cosine', start=0, end=1, steps=4), 'weight')(1)
  np.testing.assert_allclose(quarter, .5 - .5 * np.cos(np.pi / 4), rtol=1e-6)
  assert schedule(.5, 'weight')(7) == .5


@pytest.mark.parametrize(('given', 'says'), [
    (-1., 'weight'), (float('nan'), 'weight'), ('1', 'weight'), (True, 'weight'), (0., 'above 0'),
    (dict(kind='step', start=1, end=0, steps=2), 'linear'), (dict(kind='linear'), 'linear'),
    (dict(kind='linear', start=1, end=0, steps=2), 'end of weight'),
    (dict(kind='linear', start=1, end=2, steps=0), 'steps 0')])
def test_numbers_that_cannot_be_are_refused(given, says):
  with pytest.raises(InputError, match=says):
    schedule(given, 'weight', positive=True)
