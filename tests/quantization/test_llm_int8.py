"""LLM.int8() against its definition in numpy: integers, and a few inputs in floats."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import tree
from lean_jax.calibration.statistics import of_matrix
from lean_jax.errors import InputError
from lean_jax.quantization.llm_int8 import llm_int8
from lean_jax.quantization.rtn import rtn
from lean_jax.weights import Dense, Outliers

DRAW = np.random.default_rng(0)
X, W = DRAW.normal(size=(2, 5, 16)).astype(np.float32), DRAW.normal(size=(2, 16, 6)).astype('f4')
X[0, :, 3] *= 40                                        # of the first layer two, of the other one
X[0, 2, 9] = -6.
X[1, 1, 5] = 90.
EQN = 'bd,df->bf'


def stats(x):
  return of_matrix(jnp.asarray(x), second=False)


def dense(value):
  return Dense(jnp.asarray(value), 'nio'[-value.ndim:], ('layers', 'embed', 'mlp')[-value.ndim:])


def reference(x, w):
  """Section 3.2 in float64: vector-wise integers of the usual inputs, floats of the others."""
  x, w = x.astype(np.float64), w.astype(np.float64)
  large = np.abs(x).max(0) >= 6
  rest, rows = np.where(large, 0, x), np.where(large[:, None], 0, w)
  a, b = np.abs(rest).max(1, keepdims=True) / 127, np.abs(rows).max(0, keepdims=True) / 127
  return (np.round(rest / a) @ np.round(rows / b)) * a * b + x[:, large] @ w[large]


@pytest.mark.parametrize('layer', [0, 1])
def test_it_is_the_product_of_the_paper(layer):
  w = llm_int8(dense(W[layer]), 'w8a8', stats(X[layer]))
  assert isinstance(w, Outliers)
  np.testing.assert_array_equal(w.index, [[3, 9], [5]][layer])
  got = w.einsum(EQN, jnp.asarray(X[layer]))
  # a rounding of a code may fall to the other side in float32: a step is 1/127 of a range of 3
  np.testing.assert_allclose(got, reference(X[layer], W[layer]), atol=2e-3)


def test_what_integers_lose_to_a_large_input_is_kept():
  w, x = dense(W[1]), jnp.asarray(X[1])
  want = X[1].astype(np.float64) @ W[1]
  off = lambda w: np.abs(np.asarray(w.einsum(EQN, x)) - want)[1].max()
  assert off(llm_int8(w, 'w8a8', stats(X[1]))) < .1 < off(rtn(w, 'w8a8'))


def test_the_value_is_rounded_but_for_the_rows_of_outliers():
  w = llm_int8(dense(W[0]), 'w8a8', stats(X[0]))
  value, usual = np.asarray(w.unbox()), [k for k in range(16) if k not in (3, 9)]
  np.testing.assert_array_equal(value[[3, 9]], W[0][[3, 9]])
  assert 0 < np.abs(value - W[0])[usual].max() < 3.5 / 127


def test_stacked_layers_have_room_for_the_most_and_compute_as_each_by_itself():
  each = [stats(x) for x in X]
  together = llm_int8(dense(W), 'w8a8', jax.tree.map(lambda *s: jnp.stack(s), *each))
  np.testing.assert_array_equal(together.index, [[3, 9], [5, 16]])
  for k in range(2):
    one = jax.tree.map(lambda a, k=k: a[k], together).remove_axis(0, {})
    alone = llm_int8(dense(W[k]), 'w8a8', each[k])
    np.testing.assert_allclose(one.einsum(EQN, jnp.asarray(X[k])),
                               alone.einsum(EQN, jnp.asarray(X[k])), atol=1e-5)
    roomy = alone.padded(2)
    assert jax.tree.structure(roomy) == jax.tree.structure(one)
    jax.tree.map(np.testing.assert_array_equal, roomy, one)


def test_without_outliers_it_is_w8a8():
  x = jnp.asarray(X[1, :1])
  w = llm_int8(dense(W[0]), 'w8a8', stats(x), threshold=1e3)
  np.testing.assert_array_equal(w.index, [16])
  np.testing.assert_allclose(w.einsum(EQN, x), rtn(dense(W[0]), 'w8a8').einsum(EQN, x), atol=1e-5)


def test_its_bytes_are_those_of_w8a8_and_of_its_rows():
  w = llm_int8(dense(W[0]), 'w8a8', stats(X[0]))
  # rows and indices in four bytes, and one number an input that hides outliers from the integers
  more = 2 * 6 * 4 + 2 * 4 + 16 * 4
  assert tree.nbytes(w) == tree.nbytes(rtn(dense(W[0]), 'w8a8')) + more
  assert tree.parameters({'w': w}) == 16 * 6


def test_what_cannot_be_is_refused_in_one_line():
  with pytest.raises(InputError, match='float model') as error:
    llm_int8(rtn(dense(W[0]), 'w8a8'), 'w8a8', stats(X[0]))
  assert '\n' not in str(error.value)
  other = dataclasses.replace(stats(X[0]), top=jnp.zeros(8))
  with pytest.raises(InputError, match=r'inputs \(8,\), and the weight has \(16,\)'):
    llm_int8(dense(W[0]), 'w8a8', other)
