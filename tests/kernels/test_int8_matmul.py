"""int8_matmul: every implementation is the reference, and the reference is the arithmetic."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lean_jax.kernels.int8_matmul import api, cpu, reference
from lean_jax.kernels.native import library
from lean_jax.quantization import layouts
from lean_jax.quantization.packing import pack
from lean_jax.quantization.spec import parse_spec
from tests.kernels import levels

native = pytest.param('native', marks=pytest.mark.skipif(
    library.why_not() is not None, reason=f'the native kernels: {library.why_not()}'))


def operands(shape, seed=0, group=None):
  *batch, M, K, N = shape
  G = -(-K // group) if group else 1
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(*batch, M, K)).astype(np.float32)
  values = rng.integers(-127, 128, (*batch, K, N)).astype(np.int8)
  scale = rng.uniform(.01, 1, (*batch, G, N)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(values), jnp.asarray(scale)


@pytest.mark.parametrize('implementation', ['xla', None, native])
@settings(deadline=None, max_examples=6)
@given(st.tuples(st.integers(1, 9), st.integers(1, 33), st.integers(1, 9)),
       st.sampled_from([None, 1, 4, 8]), st.booleans(), st.integers(0, 2 ** 31 - 1))
def test_an_implementation_equals_the_reference(implementation, shape, group, static, seed):
  assume(implementation != 'native' or group != 1)      # not of it
  x, values, scale = operands(shape, seed, group)
  how = dict(group=group, x_scale=jnp.asarray(.02) if static else None)
  got = api.int8_matmul(x, values, scale, **how, implementation=implementation)
  # the integers are exact; a few groups' float32 terms are added in another order
  want = reference.int8_matmul(x, values, scale, **how)
  most = float(jnp.abs(want).max())
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * most if group else 1e-30)


def panels(values, bits):
  """Values in layout 'panels', None where they have none such."""
  if values.shape[-1] % 64:
    return None
  return layouts.arranged(values, parse_spec(f'w{bits}a8'), 'panels')


@levels.EACH
@pytest.mark.parametrize('bits', [8, 4])
@settings(deadline=None, max_examples=4)
@given(st.tuples(st.sampled_from([1, 2, 7, 16, 19]), st.integers(1, 90),
                  st.sampled_from([1, 64, 70, 128, 150])),
       st.sampled_from([None, 8, 24, 64]), st.booleans(), st.integers(0, 2 ** 31 - 1))
def test_every_level_of_the_native_kernel_equals_the_reference(level, bits, shape, group, static,
                                                               seed):
  x, values, scale = operands((2, *shape), seed, group)
  top = 2 ** (bits - 1)
  values = jnp.clip(values, -top, top - 1)
  x_scale = jnp.asarray([.02, .03]) if static else None
  want = reference.int8_matmul(x, values, scale, x_scale, group)
  most = float(jnp.abs(want).max())
  for laid_out in (pack(values, bits), panels(values, bits)):
    if laid_out is not None and (laid_out.ndim == 3 or library.takes_panels(level)):
      got = cpu.int8_matmul(x, laid_out, scale, group or shape[1], x_scale, level)
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * most)


@levels.EACH
@pytest.mark.parametrize('M', [1, 3, 260])
def test_large_products_are_exact_in_their_integers_and_in_order(level, M):
  # More columns than a span, more rows than are laid out at a time; the sums reach 2 ** 27.
  x = jnp.full((M, 1100), 127.).at[:, ::3].set(-127.)
  values = jnp.asarray(np.random.default_rng(0).integers(100, 128, (1100, 4170)), jnp.int8)
  scale = jnp.arange(1., 4171.)[None]
  got = cpu.int8_matmul(x, values, scale, 1100, None, level)
  exact = np.asarray(x, np.int64) @ np.asarray(values, np.int64)
  np.testing.assert_array_equal(np.asarray(got), exact.astype(np.float32) * np.asarray(scale))
  if library.takes_panels(level):
    got = cpu.int8_matmul(x, panels(values[:, :4160], 8), scale[:, :4160], 1100, None, level)
    np.testing.assert_array_equal(np.asarray(got), (exact.astype(np.float32) * scale)[:, :4160])


@pytest.mark.skipif(not library.takes_panels(), reason='no kernel here reads panels')
def test_panels_are_the_same_codes_in_every_implementation():
  x, values, scale = operands((2, 3, 18, 64))
  for bits, codes in ((8, values), (4, values // 16)):
    want = reference.int8_matmul(x, codes, scale)
    for implementation in ('xla', 'native', 'reference'):
      got = api.int8_matmul(x, panels(codes, bits), scale, layout='panels',
                            implementation=implementation)
      np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)
    grad = lambda v, layout: jax.grad(lambda s: jnp.sum(api.int8_matmul(
        x, v, s, layout=layout) ** 2))(scale)
    np.testing.assert_allclose(grad(panels(codes, bits), 'panels'),
                               grad(pack(codes, bits), 'packed'), rtol=1e-5)
  with pytest.raises(ValueError, match='expected'):
    api.int8_matmul(x[..., :15], panels(values, 8), scale, layout='panels')


@pytest.mark.parametrize('implementation', ['xla', native])
def test_four_bits_are_the_same_codes_packed(implementation):
  x, values, scale = operands((2, 3, 18, 5))
  values = values // 16
  got = api.int8_matmul(x, pack(values, 4), scale, implementation=implementation)
  np.testing.assert_allclose(got, reference.int8_matmul(x, values, scale), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize('implementation', ['xla', native])
def test_nan_and_infinite_activations_reach_their_rows_alone(implementation):
  x, values, scale = operands((4, 24, 70))
  x = x.at[1, 2].set(jnp.nan).at[2, 5].set(jnp.inf).at[3].set(0.)
  y = api.int8_matmul(x, values, scale, implementation=implementation)
  assert np.isnan(y[1]).all() and np.isnan(y[2]).all() and not np.any(y[3])
  assert np.isfinite(y[0]).all()


def test_the_reference_is_the_float64_product_of_the_rounded_rows():
  x, values, scale = operands((3, 5, 16, 4))
  codes, row_scale = reference.quantize_rows(x)
  f64 = lambda a: np.asarray(a, np.float64)
  want = (f64(codes) * f64(row_scale)) @ (f64(values) * f64(scale))
  # three float32 roundings after an exact sum
  np.testing.assert_allclose(reference.int8_matmul(x, values, scale), want, rtol=4e-7, atol=1e-6)
  assert np.all(np.abs(f64(codes) * f64(row_scale) - f64(x)) <= f64(row_scale) * .5001)


@pytest.mark.parametrize('group', [None, 6])
def test_gradients_pass_straight_through_the_rounding_of_x(group):
  x, values, scale = operands((5, 16, 4), group=group)
  g = jax.random.normal(jax.random.key(0), (5, 4))
  product = lambda x, s: api.int8_matmul(x, values, s, group=group)
  dx, ds = jax.grad(lambda x, s: jnp.sum(product(x, s) * g), (0, 1))(x, scale)
  f64 = lambda a: np.asarray(a, np.float64)
  rows = np.repeat(f64(scale), group or 16, axis=0)[:16]
  np.testing.assert_allclose(dx, f64(g) @ (f64(values) * rows).T, rtol=2e-5, atol=1e-3)
  codes, step = reference.quantize_rows(x)
  each = (f64(codes) * f64(step)).T @ f64(g) * f64(values)
  want = np.add.reduceat(each, np.arange(0, 16, group or 16), axis=0)
  np.testing.assert_allclose(ds, want, rtol=2e-5, atol=1e-2)


@pytest.mark.parametrize('change', [
    lambda x, v, s: (x[:, :-1], v, s), lambda x, v, s: (x, v, s[:, :-1]),
    lambda x, v, s: (x[0], v, s), lambda x, v, s: (x, v.astype(jnp.int32), s),
    lambda x, v, s: (x, v.astype(jnp.uint8), s)])
def test_operands_that_do_not_fit_are_refused(change):
  with pytest.raises(ValueError, match='expected'):
    api.int8_matmul(*change(*operands((3, 8, 4))))


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match='there are: native, pallas, xla, reference'):
    api.int8_matmul(*operands((3, 8, 4)), implementation='fast')
  with pytest.raises(ValueError, match='expected one of relu'):
    api.int8_matmul(*operands((3, 8, 4)), activation='tanh')
