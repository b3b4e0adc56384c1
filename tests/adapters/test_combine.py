"""Adapters combined, and put together by name."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.adapters.combine import _merge, dropped, largest
from tests.adapters.stirring import stirred

WHERE = dict(where='layers/(attention/q|mlp/down)/kernel')


@pytest.fixture(scope='module')
def adapted(tiny_model):
  base = lean.quantize(tiny_model, 'w4a16-g16')
  return dict(one=stirred(lean.attach_lora(base, rank=2, **WHERE), .2),
              two=stirred(lean.attach_lora(base, rank=3, seed=1, where='layers/mlp/down/kernel'),
                          .2))


def difference(model, path=('mlp', 'down')):
  w = model.params['layers'][path[0]][path[1]]['kernel']
  return np.asarray(w.scale * (w.a @ w.b))


def test_cat_is_the_weighted_sum_and_svd_its_nearest_of_a_rank(adapted):
  whole = lean.combine(adapted, 'cat', weights=dict(two=.25, one=.5))
  want = .5 * difference(adapted['one']) + .25 * difference(adapted['two'])
  np.testing.assert_allclose(difference(whole), want, atol=1e-6)
  assert whole.params['layers']['mlp']['down']['kernel'].a.shape[-1] == 5
  np.testing.assert_allclose(difference(lean.combine(adapted, rank=5, weights=[.5, .25])), want,
                             atol=1e-6)
  near = difference(lean.combine(adapted, rank=1, weights=[.5, .25]))
  u, s, v = np.linalg.svd(want.astype(np.float64), full_matrices=False)
  np.testing.assert_allclose(near, u[..., :1] * s[:, None, :1] @ v[:, :1], atol=1e-5)
  # a weight that one of them leaves alone counts for nothing in it
  np.testing.assert_allclose(difference(whole, ('attention', 'q')),
                             .5 * difference(adapted['one'], ('attention', 'q')), atol=1e-6)
  mean = lean.combine(adapted, 'cat')
  np.testing.assert_allclose(difference(mean), difference(adapted['one']) / 2 +
                             difference(adapted['two']) / 2, atol=1e-6)


def test_ties_keeps_the_largest_and_the_mean_of_the_elected_sign():
  x = jnp.asarray([[1., -4., 2., .5]])
  np.testing.assert_array_equal(largest(x, .5), [[0, -4, 2, 0]])
  xs = [jnp.asarray([[3., -1., 2., -5.]]), jnp.asarray([[1., 2., -1., -1.]])]
  merge = _merge('ties', 1.)
  np.testing.assert_array_equal(merge(xs, [1., 1.], jax.random.key(0)), [[2., 2., 2., -3.]])


def test_dare_keeps_the_mean():
  x = jnp.linspace(-1, 1, 8).reshape(1, 8)
  draws = jax.vmap(lambda key: dropped(x, .25, key))(jax.random.split(jax.random.key(0), 4000))
  kept = float((draws != 0).mean())
  # 32000 draws: a deviation of .0024
  assert abs(kept - .25) < .01
  np.testing.assert_allclose(draws.mean(axis=0), x, atol=.12)
  np.testing.assert_allclose(np.unique(np.round(draws[:, 0, 0], 5)), [-4, 0])


@pytest.mark.slow
def test_dare_follows_the_seed(adapted):
  one = lean.combine(adapted, 'dare_linear_svd', density=.5)
  again = lean.combine(adapted, 'dare_linear_svd', density=.5)
  other = lean.combine(adapted, 'dare_linear_svd', density=.5, seed=1)
  np.testing.assert_array_equal(difference(one), difference(again))
  assert np.abs(difference(one) - difference(other)).max() > .01


@pytest.mark.parametrize(('how', 'said'), [
    (dict(method='mean'), 'there are: cat, linear'), (dict(method='ties'), 'density None'),
    (dict(method='ties_svd', density=1.5), 'density 1.5'), (dict(density=.5), 'leave it out'),
    (dict(method='cat', rank=2), 'leave it out'), (dict(method='linear'), r'ranks \[2, 3\]'),
    (dict(rank=100), 'rank 100'), (dict(weights=[1.]), '1 weights for 2'),
    (dict(weights=dict(one=1., three=2.)), 'the adapters are one, two')])
def test_settings_that_do_not_fit_are_refused(adapted, how, said):
  with pytest.raises(lean.InputError, match=said):
    lean.combine(adapted, **how)


def test_adapters_that_do_not_combine_are_refused(tiny_model, adapted):
  for given, said in (({}, 'no adapters'), (dict(one=tiny_model), 'none of the models'),
                      (dict(adapted, other=lean.attach_lora(tiny_model, rank=2)), 'same base')):
    with pytest.raises(lean.InputError, match=said):
      lean.combine(given)
  base = lean.quantize(tiny_model, 'w4a16-g16')
  with pytest.raises(lean.InputError, match='other than LoRA'):
    lean.combine(dict(adapted, other=lean.attach(base, 'ia3')))


@pytest.mark.slow
def test_more_are_put_to_several(tiny_model, adapted):
  both = lean.together(adapted)
  base = lean.quantize(tiny_model, 'w4a16-g16')
  third = stirred(lean.attach_lora(base, rank=1, seed=2, **WHERE), .2)
  whole = lean.together(dict(both=both, three=third))
  tokens = np.arange(12)[None]
  for name, model in dict(adapted, three=third).items():
    np.testing.assert_allclose(lean.use(whole, name).logits(tokens), model.logits(tokens),
                               atol=1e-4)


def test_two_adapters_of_one_name_are_refused(adapted):
  both = lean.together(adapted)
  assert both.params['layers']['mlp']['down']['kernel'].adapters == ('one', 'two')
  with pytest.raises(lean.InputError, match="two adapters are named 'two'"):
    lean.together(dict(both=both, two=adapted['two']))
