"""The experiment on caches says what fails."""
import numpy as np
import pytest

from lean_jax.experiments.kv_cache import claims, error


def test_keys_whose_channels_lie_apart_are_nearer_by_channel():
  draw = np.random.default_rng(0).normal
  keys = dict(layers=dict(k=draw(size=(1, 2, 64, 16)) + 20 * draw(size=16), v=draw(size=(3,))))
  assert error(keys, per_token=False) < error(keys, per_token=True) / 4


@pytest.mark.parametrize(('change', 'fails'), [
    (dict(), 0), (dict(int8=1.002), 1), (dict(int4=1.02), 1), (dict(int8=9., int4=9.), 2),
    ({'keys per channel': 1.}, 1)])
def test_a_claim_holds_or_fails_by_its_figures(change, fails):
  figures = {'float': 1., 'int8': 1.0005, 'int4': 1.005, 'keys per channel': .1,
             'keys per token': .2} | change
  found = {name: dict(perplexity=4 * value, error=value) for name, value in figures.items()}
  assert [passed for _, passed in claims(found)].count(False) == fails
