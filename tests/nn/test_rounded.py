"""Keys and values in codes: how far from the numbers, and what is held."""
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.nn.rounded import Rounding, decoded, encoded, shared

BOTH = [Rounding(8), Rounding(4)]


def drawn(offset, scale=1., shape=(2, 64, 40)):
  """Normal numbers whose channels lie apart, as those of keys do."""
  draw = np.random.default_rng(0)
  return (scale * (draw.normal(size=shape) + offset * draw.normal(size=shape[2]))).astype('f4')


def bound(x, axis, levels):
  """How far a code's number may be from x, in float64: see the lines.

  x lies in [m, M]; the grid begins at m and has steps of (M - m) / levels, both as float16, which
  is off by 2 ** -11 of a number, and by 2 ** -25 where the number is tiny.
  """
  least, most = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
  begins = np.abs(least) * 2. ** -11 + 2. ** -25             # of m: below it, x is cut to it
  span = most - least + begins
  step = span / levels * (1 + 2. ** -11) + 2. ** -25         # M may lie past the last code as well
  ends = span * 2. ** -11 + levels * 2. ** -25
  float32 = 4 * 2. ** -24 * np.maximum(np.abs(least), np.abs(most))
  return np.maximum(step / 2, begins + ends) + float32


@pytest.mark.parametrize('rounding', BOTH, ids=str)
@pytest.mark.parametrize('per_token', [False, True])
@pytest.mark.parametrize(('offset', 'scale'), [(0., 1.), (30., 1.), (3., 1e-5), (1., 2000.)])
def test_what_is_stored_is_as_near_as_half_a_step(rounding, per_token, offset, scale):
  x = drawn(offset, scale)
  real = jnp.ones((2, 64, 1), bool)
  codes, *grids = encoded(jnp.asarray(x), real, rounding, per_token=per_token)
  assert codes.dtype == jnp.uint8
  assert codes.nbytes * 8 == x.size * rounding.bits
  assert [g.dtype for g in grids] == [jnp.float16] * 2
  assert grids[0].shape == ((2, 64, 2) if per_token else (2, 2, 40))
  found = np.asarray(decoded(codes, *grids, rounding, jnp.float32), np.float64)
  parts = (2, 64, 2, 20) if per_token else (2, 2, 32, 40)
  wide = x.astype(np.float64).reshape(parts)
  off = np.abs(found.reshape(parts) - wide)
  limit = bound(wide, 3 if per_token else 2, 2 ** rounding.bits - 1)
  assert (off <= limit).all()
  assert off.max() > limit.min() / 4                         # the bound is no wish


def test_what_is_no_token_does_not_widen_a_grid():
  x = jnp.asarray(drawn(1., shape=(1, 32, 4)))
  real = (jnp.arange(32) >= 5).reshape(1, 32, 1)
  other = jnp.where(real, x, 1e4)
  grids = lambda x: encoded(x, real, BOTH[1], per_token=False)[1:]
  np.testing.assert_array_equal(grids(x), grids(other))
  alone = encoded(x[:, 5:], real[:, 5:], Rounding(4, group=27), per_token=False)
  np.testing.assert_array_equal(alone[1:], grids(x))


def test_numbers_that_are_all_the_same_are_kept_and_none_at_all_are_zeros():
  same = jnp.full((1, 32, 4), 1.5)                           # a float16
  real = jnp.ones((1, 32, 1), bool)
  back = lambda real: decoded(*encoded(same, real, BOTH[1], per_token=False), BOTH[1], jnp.float32)
  np.testing.assert_array_equal(back(real), same)
  np.testing.assert_array_equal(back(~real), jnp.zeros_like(same))


def test_numbers_past_the_greatest_float16_are_cut_to_it():
  x = jnp.full((1, 32, 2), 1e6).at[:, 0].set(-1e6)
  found = decoded(*encoded(x, jnp.ones((1, 32, 1), bool), BOTH[0], per_token=False), BOTH[0],
                  jnp.float32)
  np.testing.assert_allclose(found, jnp.clip(x, -65504, 65504), rtol=2e-3)


@pytest.mark.parametrize('per_token', [False, True])
def test_a_nan_stays_one_with_all_that_share_its_grid_and_no_others(per_token):
  x = jnp.ones((1, 64, 4)).at[0, 40, 2].set(jnp.nan)
  of = lambda real: np.isnan(decoded(*encoded(x, real, BOTH[1], per_token=per_token), BOTH[1],
                                     jnp.float32))
  real = jnp.ones((1, 64, 1), bool)
  expected = np.zeros(x.shape, bool)
  expected[(0, 40) if per_token else np.s_[0, 32:, 2]] = True
  np.testing.assert_array_equal(of(real), expected)
  if not per_token:
    assert not of(real.at[0, 40].set(False)).any()           # padding shares no grid


def test_channels_that_share_a_grid_divide_a_head():
  assert [shared(n) for n in (8, 32, 64, 80, 96, 128)] == [8, 32, 32, 20, 32, 32]
