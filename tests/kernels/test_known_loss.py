"""known_loss: of a teacher of whom k tokens are known it is what distill_loss is of all of him."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.distill_loss.api import distill_loss, known_loss
from lean_jax.training import mesh as meshes

T, D, V, K = 13, 6, 37, 5


@pytest.fixture(scope='module')
def operands():
  """hs, ws, ht, wt, labels, weights, and the teacher's log-probabilities [T V]."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  hs, ws, ht, wt = normal(T, D), normal(D, V), normal(T, D), normal(D, V)
  weights = jnp.asarray(draw.integers(0, 3, T), jnp.float32)
  return hs, ws, ht, wt, jnp.asarray(draw.integers(0, V, T)), weights, jax.nn.log_softmax(ht @ wt)


def known(log_p, k):
  ids = np.argsort(-np.asarray(log_p), axis=1)[:, :k]
  p = np.exp(np.asarray(log_p, np.float64))
  top = np.take_along_axis(p, ids, 1)
  tail = [] if k == V else [1 - top.sum(1, keepdims=True)]
  return jnp.asarray(ids), jnp.asarray(np.log(np.concatenate([top, *tail], 1)), jnp.float32)


def run(loss, hs, ws):
  (value, parts), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hs, ws)
  return value, parts['soft'], parts['hard'], *grads


def compare(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)           # float32: sums of 37 terms of order 10


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_its_forward_kl_is_the_top_k_divergence_with_its_gradients(operands, implementation):
  hs, ws, ht, wt, labels, weights, log_p = operands
  shared = dict(labels=labels, weights=weights, soft_weight=.6)
  compare(run(lambda hs, ws: known_loss(hs, ws, *known(log_p, K), chunk=4,
                                        implementation=implementation, **shared), hs, ws),
          run(lambda hs, ws: distill_loss(hs, ws, ht, wt, kind='top_k', k=K,
                                          implementation='reference', **shared), hs, ws))


def test_where_all_tokens_are_known_it_is_the_whole_divergence_at_any_temperature(operands):
  hs, ws, ht, wt, _, weights, log_p = operands
  shared = dict(kind='reverse_kl', weights=weights, temperature=3.)
  compare(run(lambda hs, ws: known_loss(hs, ws, *known(log_p, V), chunk=4, **shared), hs, ws),
          run(lambda hs, ws: distill_loss(hs, ws, ht, wt, **shared), hs, ws))


def test_on_a_mesh_it_is_the_same(operands):
  hs, ws, _, _, _, weights, log_p = operands
  loss = lambda **how: lambda hs, ws: known_loss(hs, ws, *known(log_p, K), kind='jsd',
                                                 weights=weights, chunk=2, **how)
  want = run(loss(), hs, ws)
  with jax.set_mesh(meshes.make_mesh(4, 2)):
    compare(run(loss(axes=('data', 'fsdp')), hs, ws), want)         # 8 devices, 13 tokens


@pytest.mark.parametrize(('change', 'says'), [
    (dict(ids=jnp.zeros((T, K))), 'float32'), (dict(log_probs=jnp.zeros((T, K))), r'\[T k\+1\]'),
    (dict(ids=jnp.zeros((2, K), int)), r'\(2, 5\)'), (dict(kind='top_k'), "'forward_kl' here"),
    (dict(temperature=0.), 'temperature'), (dict(kind='x'), 'expected one of')])
def test_what_does_not_fit_is_refused(operands, change, says):
  ids, log_probs = known(operands[-1], K)
  with pytest.raises(ValueError, match=says):
    known_loss(*operands[:2], **dict(ids=ids, log_probs=log_probs) | change)
