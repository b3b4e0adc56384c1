"""int8_matmul: every implementation is the reference, and the reference is the arithmetic."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_jax.kernels.int8_matmul import api, reference


def operands(shape, seed=0):
  *batch, M, K, N = shape
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(*batch, M, K)).astype(np.float32)
  values = rng.integers(-127, 128, (*batch, K, N)).astype(np.int8)
  scale = rng.uniform(.01, 1, (*batch, 1, N)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(values), jnp.asarray(scale)


@pytest.mark.parametrize('implementation', [k for k in api.IMPLEMENTATIONS if k != 'reference'])
@settings(deadline=None, max_examples=15)
@given(st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(1, 9)),
       st.integers(0, 2 ** 31 - 1))
def test_an_implementation_equals_the_reference(implementation, shape, seed):
  x, values, scale = operands(shape, seed)
  got = api.int8_matmul(x, values, scale, implementation=implementation)
  # the integers are exact and the scales are applied in the same order
  np.testing.assert_allclose(got, reference.int8_matmul(x, values, scale), rtol=1e-6)


def test_the_reference_is_the_float64_product_of_the_rounded_rows():
  x, values, scale = operands((3, 5, 16, 4))
  codes, row_scale = reference.quantize_rows(x)
  f64 = lambda a: np.asarray(a, np.float64)
  want = (f64(codes) * f64(row_scale)) @ (f64(values) * f64(scale))
  # three float32 roundings after an exact sum
  np.testing.assert_allclose(reference.int8_matmul(x, values, scale), want, rtol=4e-7, atol=1e-6)
  assert np.all(np.abs(f64(codes) * f64(row_scale) - f64(x)) <= f64(row_scale) * .5001)


def test_gradients_pass_straight_through_the_rounding_of_x():
  x, values, scale = operands((5, 16, 4))
  g = jax.random.normal(jax.random.key(0), (5, 4))
  dx, ds = jax.grad(lambda x, s: jnp.sum(api.int8_matmul(x, values, s) * g), (0, 1))(x, scale)
  f64 = lambda a: np.asarray(a, np.float64)
  np.testing.assert_allclose(dx, f64(g) @ (f64(values) * f64(scale)).T, rtol=2e-5, atol=1e-3)
  want = (f64(g) * (f64(x) @ f64(values))).sum(0, keepdims=True)
  np.testing.assert_allclose(ds, want, rtol=2e-5, atol=1e-2)


def test_a_nan_reaches_the_product_and_a_row_of_zeros_is_zero():
  x, values, scale = operands((3, 8, 4))
  y = api.int8_matmul(x.at[1, 2].set(jnp.nan).at[2].set(0.), values, scale)
  assert bool(jnp.all(jnp.isnan(y[1]))) and bool(jnp.all(y[2] == 0))
  assert bool(jnp.all(jnp.isfinite(y[0])))


@pytest.mark.parametrize('change', [
    lambda x, v, s: (x[:, :-1], v, s), lambda x, v, s: (x, v, s[:, :-1]),
    lambda x, v, s: (x[0], v, s), lambda x, v, s: (x, v.astype(jnp.int32), s)])
def test_operands_that_do_not_fit_are_refused(change):
  with pytest.raises(ValueError, match='expected'):
    api.int8_matmul(*change(*operands((3, 8, 4))))


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match='there are'):
    api.int8_matmul(*operands((3, 8, 4)), implementation='fast')
