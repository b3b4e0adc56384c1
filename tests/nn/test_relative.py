import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.models.decoder import DecoderConfig, empty_cache
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.relative import RelativeBias, RelativeOptions, bucket

SETTINGS = [(32, 128), (8, 20), (64, 1000)]
CONFIG = DecoderConfig(
    vocabulary=40, width=16, layers=2, heads=2, groups=2, head_width=8, hidden=16, context=64,
    attention=AttentionOptions(ropes=()), relative=RelativeOptions(8, 20))


@pytest.mark.parametrize(('buckets', 'farthest'), SETTINGS)
def test_near_keys_have_buckets_of_their_own_and_far_ones_share_the_last(buckets, farthest):
  found = bucket(jnp.arange(2 * farthest), buckets, farthest, both=False)
  half = buckets // 2
  np.testing.assert_array_equal(found[:half], np.arange(half))
  np.testing.assert_array_equal(found[farthest:], buckets - 1)
  assert set(np.diff(found).tolist()) <= {0, 1}


@pytest.mark.parametrize(('buckets', 'farthest'), SETTINGS)
def test_widths_of_buckets_grow_by_one_factor(buckets, farthest):
  found = np.asarray(bucket(jnp.arange(farthest), buckets, farthest, both=False))
  half = buckets // 2
  starts = np.array([np.argmax(found == k) for k in range(half, buckets)])
  # A bucket starts at the first integer beyond its bound.
  bounds = half * (farthest / half) ** (np.arange(half) / half)
  np.testing.assert_array_equal(starts, np.ceil(bounds - 1e-3))


def test_keys_after_a_query_have_the_other_half_of_the_buckets():
  far = jnp.arange(1, 200)
  before, after = (bucket(sign * far, 32, 128, both=True) for sign in (1, -1))
  np.testing.assert_array_equal(after, before + 16)
  np.testing.assert_array_equal(before, bucket(far, 16, 128, both=False))
  np.testing.assert_array_equal(bucket(-far, 32, 128, both=False), 0)


def test_a_score_is_the_heads_number_of_the_bucket():
  distance = jnp.arange(5).reshape(5, 1) - jnp.arange(7).reshape(1, 7)
  module = RelativeBias(CONFIG)
  params = module.init(jax.random.key(0), distance)['params']
  bias = module.apply({'params': params}, distance)
  assert bias.shape == (1, 2, 5, 7)
  for t, s, head in ((4, 0, 1), (2, 2, 0), (0, 6, 1)):
    k = int(bucket(jnp.asarray(t - s), 8, 20, both=False))
    assert bias[0, head, t, s] == params['table'][k, head]


@pytest.fixture(scope='module')
def model():
  """(params, the jitted module) of a decoder whose only positions are distances."""
  module = CONFIG.module
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  params['relative']['table'] = 3. * jax.random.normal(jax.random.key(1), (8, 2))
  return params, jax.jit(lambda p, *given: module.apply({'params': p}, *given))


def test_positions_are_seen_through_the_cache_too(model):
  params, run = model
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 30)))
  whole, _ = run(params, tokens)
  cache, parts = empty_cache(CONFIG, 2, 40), []
  for start, end in ((0, 27), (27, 28), (28, 30)):
    logits, cache = run(params, tokens[:, start:end], cache, start)
    parts.append(logits)
  # Sums over 40 keys instead of 30: float32.
  np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing(model):
  params, run = model
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (1, 30)))
  mask = jnp.arange(30)[None] >= 7
  padded, _ = run(params, tokens, None, 0, mask)
  np.testing.assert_allclose(padded[:, 7:], run(params, tokens[:, 7:])[0], rtol=1e-4, atol=1e-5)


def test_the_scores_of_distances_are_learned(model):
  params, run = model
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (1, 30)))
  slope = jax.grad(lambda p: jnp.var(run(p, tokens)[0]))(params)['relative']['table']
  assert (np.abs(slope) > 0).all()
