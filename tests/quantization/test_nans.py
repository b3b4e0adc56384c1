"""A NaN in a weight or in activations is an error or a NaN wherever it is, and never a number."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.calibration import statistics
from lean_jax.quantization.ema import Average, ema
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.ranges import input_step
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.smoothquant import smooth_scales
from lean_jax.weights import Dense

LONG = 4096                   # numbers that share a scale, vectors to a CPU


def draw(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize('scheme', ['w8a8', 'w4a16-g64', 'w4a16-asym', 'w8a16-tensor', 'nf4-g64',
                                    'nf4-g64-dq', 'w1.58a16', 'fp8', 'mxfp4', 'mxfp8'])
@pytest.mark.parametrize('dims', ['io', 'oi'])
def test_a_stored_weight_of_a_nan_is_nan_there_and_in_its_products(scheme, dims):
  value = draw(LONG, 3).at[37, 1].set(jnp.nan)
  w = rtn(Dense(value if dims == 'io' else value.T, dims, (None, None)), scheme)
  assert bool(jnp.isnan(w.unbox() if dims == 'io' else w.unbox().T)[37, 1])
  y = w.einsum('bi,io->bo' if dims == 'io' else 'bi,oi->bo', jnp.ones((2, LONG)))
  assert bool(jnp.isnan(y[:, 1]).all())


@pytest.mark.parametrize('shape', [(LONG, 3), (3, LONG)])
def test_statistics_of_a_nan_are_not_finite_and_neither_is_what_follows_from_them(shape):
  x = draw(*shape).at[1, 2].set(jnp.nan)
  seen = [jax.jit(statistics.of_matrix)(x), jax.jit(statistics.of_groups)(
      x, jnp.array([shape[0]]))]
  for stats in seen:
    assert not bool(stats.finite.all()) and bool(jnp.isnan(stats.top[..., 2]).all())
    assert bool(jnp.isnan(input_step(stats)).all())
    s = smooth_scales([draw(shape[1], 4)], [stats], None)
    assert np.flatnonzero(np.isnan(s)).tolist() == [2]


def test_a_smooth_scale_of_a_weight_with_a_nan_is_nan():
  stats = statistics.of_matrix(draw(8, 3))
  s = smooth_scales([draw(3, LONG).at[1, 77].set(jnp.nan)], [stats], None)
  assert np.isnan(s).tolist() == [False, True, False]


@pytest.mark.parametrize('shape', [(4, LONG), (LONG, 4)])
def test_an_average_range_of_a_nan_is_nan_and_stays_so(shape):
  w = ema(fake_quantize(Dense(draw(shape[1], 3), 'io', (None, None)), 'w8a8'), .9)
  x = draw(*shape).at[1, 2].set(jnp.nan)
  y, pull = jax.vjp(lambda w: w.einsum('bi,io->bo', x), w)
  assert bool(jnp.isnan(y).all())                      # of a first batch, which gives the range
  assert bool(jnp.isnan(pull(jnp.ones_like(y))[0].inputs.range))
  rows = lambda r, x: Average(r, .9).rounded_rows(x, jnp.array([shape[0] - 2, 2]))
  assert np.isnan(rows(jnp.ones(2), x)).sum() == 1     # of a range that there is
  assert bool(jnp.isnan(rows(jnp.full(2, jnp.nan), draw(*shape))).all())
