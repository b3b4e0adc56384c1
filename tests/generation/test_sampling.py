"""The choice of a token: probabilities of what is drawn, and what is cut."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation.sampling import (
  Sampling,
  checked,
  drawn,
  most_probable,
  nucleus,
  sample,
  shaped,
)

PROBS = np.array([.5, .3, .15, .05], np.float32)
run = jax.jit(shaped)


def logits_of(rows=1):
  return jnp.tile(jnp.log(jnp.asarray(PROBS))[None], (rows, 1))


def keys(n):
  return jax.random.split(jax.random.key(0), n)


@pytest.mark.parametrize(('settings', 'expected'), [
    (dict(), [.5, .3, .15, .05]), (dict(top_k=2), [.625, .375, 0, 0]),
    (dict(top_p=.7), [.625, .375, 0, 0]), (dict(top_p=.81, top_k=9), [10 / 19, 6 / 19, 3 / 19, 0]),
    (dict(top_k=1), [1, 0, 0, 0]), (dict(top_p=1.), [.5, .3, .15, .05]),
    (dict(min_p=.5), [.625, .375, 0, 0]), (dict(min_p=1.), [1, 0, 0, 0]),
    (dict(temperature=.5), PROBS ** 2 / (PROBS ** 2).sum()),
    (dict(top_k=3, top_p=.53), [.625, .375, 0, 0])])
def test_samples_have_the_probabilities_of_what_is_kept(settings, expected):
  n = 20_000
  ids = sample(logits_of(n), keys(n), checked(**dict(temperature=1.) | settings))
  # Five standard deviations of a share of n draws at worst.
  np.testing.assert_allclose(np.bincount(ids, minlength=4) / n, expected, atol=5 * .5 / n ** .5)


def test_draws_of_a_large_vocabulary_have_its_probabilities():
  V, n = 1000, 50_000                        # several rows of it, the last one not full
  logits = jnp.asarray(np.random.default_rng(0).normal(size=V).astype(np.float32))
  ids = jax.jit(drawn)(jnp.tile(logits[None], (n, 1)), keys(n))
  expected = n * np.asarray(jax.nn.softmax(logits))
  found = np.bincount(ids, minlength=V)
  # The statistic has mean V - 1 and variance 2 (V - 1).
  assert np.sum((found - expected) ** 2 / expected) < V + 5 * (2 * V) ** .5


def test_what_has_no_probability_is_never_drawn():
  logits = jnp.where(jnp.arange(300) % 7 == 3, 0., -jnp.inf)
  ids = jax.jit(drawn)(jnp.tile(logits[None], (5000, 1)), keys(5000))
  assert set(np.unique(ids)) == set(range(3, 300, 7))


def test_the_nucleus_is_that_of_a_sort():
  logits = np.random.default_rng(1).normal(size=(6, 333)).astype(np.float32) * 3
  logits[1] = 0                                               # all of the same probability
  logits[2, 5] = 90                                           # one has it all
  logits[3, 100:] = -np.inf
  for top_p in (1e-6, .3, .9, .999):
    probs = np.asarray(jax.nn.softmax(logits))
    ordered = -np.sort(-probs, axis=-1)
    before = np.cumsum(ordered, axis=-1, dtype=np.float64) - ordered
    least = np.min(np.where(before < top_p, ordered, 2), axis=-1, keepdims=True)
    found = jax.jit(nucleus)(logits, jnp.full((1, 1), top_p))
    np.testing.assert_array_equal(np.isfinite(found), (probs >= least) & np.isfinite(logits))


def test_the_most_probable_token_is_argmax():
  logits = np.random.default_rng(2).integers(0, 9, (50, 40)).astype(np.float32)     # with ties
  np.testing.assert_array_equal(jax.jit(most_probable)(logits), logits.argmax(axis=-1))


def test_seen_tokens_become_less_probable_whatever_their_sign():
  seen = jnp.array([[True, True, False, False]])
  found = run(jnp.array([[2., -2., 2., -2.]]), Sampling(repetition_penalty=2.), seen)
  np.testing.assert_allclose(found, [[1., -4., 2., -2.]])


def test_each_row_may_have_its_own_settings():
  each = Sampling(temperature=jnp.array([1., .5]), top_p=jnp.array([1., .7]))
  found = run(logits_of(2), each)
  one = lambda row: run(logits_of(), Sampling(each.temperature[row], None, each.top_p[row]))
  np.testing.assert_allclose(found, np.concatenate([one(0), one(1)]), rtol=1e-6)


def test_a_tiny_temperature_is_greedy():
  ids = sample(logits_of(50), keys(50), checked(1e-38))
  assert set(ids.tolist()) == {0}


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(temperature=-1.), 'temperature -1.0'),
    (dict(temperature=float('nan')), 'temperature nan'),
    (dict(temperature=float('inf')), 'temperature inf'), (dict(top_k=0), 'top_k 0'),
    (dict(top_k=-3), 'top_k -3'), (dict(top_k=2.5), 'top_k 2.5'), (dict(top_p=0.), 'top_p 0.0'),
    (dict(top_p=1.1), 'top_p 1.1'), (dict(top_p=float('nan')), 'top_p nan'),
    (dict(min_p=0.), 'min_p 0.0'), (dict(min_p=2.), 'min_p 2.0'),
    (dict(repetition_penalty=0.), 'repetition_penalty 0.0'),
    (dict(repetition_penalty=-1.), 'repetition_penalty -1.0'),
    (dict(temperature=0., top_k=5), 'top_k 5 at temperature 0'),
    (dict(temperature=0., top_p=.5), 'top_p 0.5 at temperature 0'),
    (dict(temperature=0., min_p=.5), 'min_p 0.5 at temperature 0')])
def test_a_setting_out_of_its_range_is_one_line(settings, message):
  with pytest.raises(InputError, match=message) as error:
    checked(**dict(temperature=1.) | settings)
  assert '\n' not in str(error.value)
