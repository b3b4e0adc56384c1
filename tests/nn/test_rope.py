"""Rotary positions: closed forms, and what turning by an angle must keep."""
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.nn.rope import Rope, rotate, rotation
from lean_jax.nn.rope_scaling import (
  Dynamic,
  Linear,
  Llama3,
  LongRope,
  Proportional,
  Yarn,
  yarn_scale,
)

K = 16
SCALINGS = dict(
    plain=None, linear=Linear(4.), dynamic=Dynamic(2., 8), yarn=Yarn(4., 32),
    longrope=LongRope(tuple(np.linspace(1, 2, K // 2)), tuple(np.linspace(2, 9, K // 2)), 8, 1.2),
    llama3=Llama3(8., 1., 4., 64), proportional=Proportional(.5, 2.))


def frequencies(rope, length=1, head_width=K):
  """The angles of position 1 of a sequence, [R/2]: small, so that they are told from sines."""
  positions = jnp.array([[1, length - 1]])
  cos, sin = rotation(rope, positions, head_width)
  return np.arctan2(np.asarray(sin)[0, 0], np.asarray(cos)[0, 0])


def formula(theta=10_000., width=K):
  return np.array([theta ** (-k / width) for k in range(0, width, 2)])


@pytest.mark.parametrize('interleaved', [False, True])
def test_features_turn_in_pairs_as_complex_numbers_do(interleaved):
  x = np.random.default_rng(0).normal(size=(2, 3, 2, K)).astype(np.float32)
  at = np.array([[0, 1, 2], [5, 9, 70]])
  rope = Rope(theta=100., interleaved=interleaved)
  y = np.asarray(rotate(jnp.asarray(x), *rotation(rope, jnp.asarray(at), K), interleaved))
  angle = (at[..., None] * formula(100.))[:, :, None]
  parts = lambda h: (h[..., ::2], h[..., 1::2]) if interleaved else np.split(h, 2, axis=-1)
  (a, b), (c, d) = parts(x), parts(y)
  # 70 radians in float32 are known to 4e-6.
  np.testing.assert_allclose(c + 1j * d, (a + 1j * b) * np.exp(1j * angle), atol=3e-5)


@pytest.mark.parametrize('scaling', SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize('interleaved', [False, True])
def test_scores_depend_on_the_distance_alone(scaling, interleaved):
  rope = Rope(scaling=scaling, interleaved=interleaved)
  q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, K)).astype(np.float32)

  @jax.jit
  def score(i, j):
    at = jnp.stack([i, j, 40])[None]                   # one length for all
    cos, sin = rotation(rope, at, K)
    turned = lambda h, t: rotate(h, cos[:, t:t + 1], sin[:, t:t + 1], interleaved)
    return jnp.sum(turned(jnp.asarray(q), 0) * turned(jnp.asarray(k), 1))
  near, far = score(7, 3), score(30, 26)
  np.testing.assert_allclose(near, far, atol=1e-4)
  assert abs(near - score(7, 4)) > 1e-3


def test_features_beyond_the_rotated_ones_pass_through():
  rope = Rope(fraction=.25)
  x = jax.random.normal(jax.random.key(0), (1, 5, 2, K))
  cos, sin = rotation(rope, jnp.arange(5)[None], K)
  assert cos.shape == (1, 5, 2) and rope.width(K) == 4
  y = rotate(x, cos, sin)
  np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
  np.testing.assert_allclose(frequencies(rope), formula(width=4), rtol=1e-5)
  assert (np.abs(y - x)[:, 1:, :, :4] > 0).all()


def test_a_linear_factor_divides_positions():
  np.testing.assert_allclose(frequencies(Rope(scaling=Linear(4.))), formula() / 4, rtol=1e-5)


def test_a_dynamic_base_grows_with_the_sequence_past_its_original_length():
  rope = Rope(scaling=Dynamic(2., 8))
  for length in (2, 8):
    np.testing.assert_allclose(frequencies(rope, length), formula(), rtol=1e-5)
  base = 10_000. * (2 * 12 / 8 - 1) ** (K / (K - 2))
  np.testing.assert_allclose(frequencies(rope, 12), formula(base), rtol=1e-5)


def test_longrope_has_a_set_of_factors_for_either_length():
  scaling = SCALINGS['longrope']
  for length, factors in ((8, scaling.short), (9, scaling.long)):
    np.testing.assert_allclose(frequencies(Rope(scaling=scaling), length),
                               formula() / np.array(factors), rtol=1e-5)


def test_amplitudes_multiply_cosines():
  yarn = SCALINGS['yarn']
  assert yarn.amplitude == pytest.approx(1 + .1 * math.log(4))
  assert yarn_scale(4, 2) == pytest.approx(1 + .2 * math.log(4)) and yarn_scale(.5) == 1
  both = dataclasses.replace(yarn, mscale=2., mscale_all=1.)
  assert both.amplitude == pytest.approx((1 + .2 * math.log(4)) / (1 + .1 * math.log(4)))
  for scaling in (yarn, both, dataclasses.replace(yarn, attention_factor=.5), SCALINGS['longrope']):
    cos, _ = rotation(Rope(scaling=scaling), jnp.zeros((1, 1), jnp.int32), K)
    np.testing.assert_allclose(cos, scaling.amplitude)


def test_yarn_leaves_fast_features_and_divides_slow_ones():
  got = frequencies(Rope(theta=100., scaling=Yarn(4., 128, beta_fast=8., beta_slow=1.)))
  low, high = (K * math.log(128 / (turns * 2 * math.pi)) / (2 * math.log(100)) for turns in (8, 1))
  low, high = math.floor(low), math.ceil(high)
  assert 0 < low < high < K // 2 - 1
  along = np.clip((np.arange(K // 2) - low) / (high - low), 0, 1)
  np.testing.assert_allclose(got, formula(100.) * (1 - along + along / 4), rtol=1e-5)


def test_llama3_stretches_long_waves():
  got = frequencies(Rope(theta=100., scaling=Llama3(8., 1., 4., 64)))
  waves = 2 * math.pi / formula(100.)
  assert (waves < 16).any() and ((waves > 16) & (waves < 64)).any()
  left = np.where(waves < 16, 1, np.where(waves > 64, 0, (64 / waves - 1) / 3))
  np.testing.assert_allclose(got, formula(100.) * (left + (1 - left) / 8), rtol=1e-5)


def test_a_proportion_of_the_pairs_of_the_whole_head_turns():
  got = frequencies(Rope(scaling=Proportional(.5, 2.)))
  np.testing.assert_allclose(got, np.where(np.arange(K // 2) < K // 4, formula() / 2, 0), rtol=1e-5)


@pytest.mark.parametrize('scaling', SCALINGS.values(), ids=SCALINGS)
def test_ropes_are_hashable_and_traced_positions_give_the_same(scaling):
  rope, at = Rope(scaling=scaling), jnp.arange(24).reshape(2, 12)
  assert hash(rope) == hash(dataclasses.replace(rope))
  for a, b in zip(jax.jit(rotation, static_argnums=(0, 2))(rope, at, K), rotation(rope, at, K)):
    assert a.shape == (2, 12, K // 2) and a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, atol=1e-5)
