import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.nn.pooling import MODES, pooled, unit

X = np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32)
LENGTHS = np.array([7, 4, 1])
MASK = np.arange(7)[None] < LENGTHS[:, None]
LEFT = MASK[:, ::-1]
# Of one row's real tokens [T D].
BY_HAND = dict(
    cls=lambda x: x[0], lasttoken=lambda x: x[-1], max=lambda x: x.max(axis=0),
    mean=lambda x: x.mean(axis=0), mean_sqrt_len_tokens=lambda x: x.sum(axis=0) / len(x) ** .5,
    weightedmean=lambda x: np.average(x, axis=0, weights=1 + np.arange(len(x))))


@pytest.mark.parametrize('mask', [None, MASK, LEFT], ids=['whole', 'right', 'left'])
def test_each_mode_is_its_formula_over_real_tokens(mask):
  found = jax.jit(lambda x: pooled(x, mask, MODES))(X)
  rows = [x if mask is None else x[keep] for x, keep in zip(X, MASK if mask is None else mask)]
  wanted = [np.concatenate([BY_HAND[mode](row) for mode in MODES]) for row in rows]
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)          # float32
  assert found.shape == (3, 4 * len(MODES))


def test_sums_are_of_float32_whatever_came():
  x = jnp.full((1, 1000, 1), 1 + 2 ** -7, jnp.bfloat16)
  np.testing.assert_allclose(pooled(x, None, ('mean',)), 1 + 2 ** -7, rtol=1e-5)


def test_a_row_of_padding_is_zero_and_a_vector_of_zeros_stays():
  mean = pooled(X, np.zeros((3, 7), bool), ('mean',))
  assert not mean.any() and not unit(mean).any()
  np.testing.assert_allclose(np.linalg.norm(unit(pooled(X, MASK, ('mean',))), axis=1), 1, rtol=1e-6)
