"""Attention: the blocked form is the plain one, its gradients too, at every length."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.nn.attention import attend, grouped
from lean_jax.nn.causal import causal_attention


def operands(T, H=4, G=2, K=8, dtype=jnp.float32):
  draw = lambda seed, n: jax.random.normal(jax.random.key(seed), (2, T, n, K), dtype)
  return draw(0, H), draw(1, G), draw(2, G)


def plain(q, k, v):
  T = q.shape[1]
  return attend(q, grouped(k), grouped(v), jnp.tril(jnp.ones((T, T), bool))[None, None])


def float64(q, k, v):
  """The definition, a head at a time, in numpy's float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  for h in range(q.shape[2]):
    g = h // (q.shape[2] // k.shape[2])
    for b in range(q.shape[0]):
      for t in range(q.shape[1]):
        s = k[b, :t + 1, g] @ q[b, t, h] / np.sqrt(q.shape[3])
        p = np.exp(s - s.max())
        out[b, t, h] = p @ v[b, :t + 1, g] / p.sum()
  return out


@pytest.mark.parametrize('T', [1, 7, 64, 65, 66])
def test_both_forms_are_the_definition(T):
  args = operands(T)
  want = float64(*args)
  np.testing.assert_allclose(causal_attention(*args), want, atol=2e-6)
  np.testing.assert_allclose(plain(*args), want, atol=2e-6)


@pytest.mark.parametrize('T', [7, 64, 65])
@pytest.mark.parametrize('G', [1, 2, 4])
def test_gradients_of_the_blocked_form_are_those_of_the_plain_one(T, G):
  args = operands(T, G=G)
  weight = jax.random.normal(jax.random.key(3), args[0].shape)
  grad = lambda f: jax.grad(lambda *a: jnp.sum(f(*a) * weight), (0, 1, 2))(*args)
  # sums of up to 66 terms of order 1 in float32, in another order
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), grad(causal_attention),
               grad(plain))


def test_bfloat16_stays_close():
  args = operands(66, dtype=jnp.bfloat16)
  y = causal_attention(*args)
  assert y.dtype == jnp.bfloat16
  # eight bits of mantissa in the inputs and the probabilities, and values of order 1
  np.testing.assert_allclose(y.astype(jnp.float32), float64(*args), atol=.03)


def test_nothing_of_size_T_by_T_is_kept_for_the_backward_pass():
  T = 64
  _, pull = jax.vjp(causal_attention, *operands(T))
  assert max(x.size for x in jax.tree.leaves(pull)) <= 2 * T * 4 * 8
