"""Rules over trees: the first match wins, one without a match is an error, split is undone."""
import jax
import jax.numpy as jnp
import pytest

from lean_jax import methods, tree
from lean_jax.errors import InputError
from lean_jax.weights import Dense, LowRank, Quantized


@pytest.fixture
def params():
  w = lambda *shape: Dense(jnp.ones(shape), 'io', ('embed', 'mlp'))
  return {'layers': {'up': {'kernel': w(8, 16)}, 'down': {'kernel': w(16, 8)}},
          'scale': jnp.ones(8)}


def test_the_first_rule_that_matches_the_whole_name_wins(params):
  seen = []
  rules = [('layers/up/.*', lambda w: seen.append('up') or w), ('layers/.*', None)]
  assert tree.transform(params, rules) == params
  assert seen == ['up']


@pytest.mark.parametrize('pattern', ['layer/up', 'layers/up', 'scale', 'up/kernel'])
def test_a_rule_that_matches_nothing_names_the_nearest(params, pattern):
  with pytest.raises(InputError, match='layers/up/kernel') as error:
    tree.transform(params, [(pattern, None)])
  assert repr(pattern) in str(error.value)


def test_a_rule_in_the_shade_of_another_is_an_error(params):
  with pytest.raises(InputError, match='earlier rule'):
    tree.transform(params, [('.*', None), ('layers/up/.*', None)])


def test_merge_is_the_inverse_of_split(params):
  train, rest = tree.split(params, 'layers/.*')
  assert set(tree.named_arrays(train)) | set(tree.named_arrays(rest)) == set(
      tree.named_arrays(params))
  assert not set(tree.named_arrays(train)) & set(tree.named_arrays(rest))
  merged = tree.merge(train, rest)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  with pytest.raises(InputError, match='matches no array'):
    tree.split(params, 'nope')


def test_methods_by_name_compose_in_any_order(params):
  lean = methods.apply(params, (
      dict(where='layers/up/.*', method='rtn', spec='w4a16-g8'),
      dict(where='layers/.*', method='rtn', spec='w8a8'),
      dict(where='layers/.*', method='lora', rank=2, alpha=4)), jax.random.key(0))
  up, down = lean['layers']['up']['kernel'], lean['layers']['down']['kernel']
  assert isinstance(up, LowRank) and isinstance(up.base, Quantized)
  assert (up.base.spec.bits, down.base.spec.bits) == (4, 8)
  assert not bool(jnp.all(up.a[0] == up.a[1]))


def test_each_weight_draws_its_own_numbers(params):
  lean = methods.apply(params, (dict(where='.*', method='lora', rank=8, alpha=4),),
                       jax.random.key(0))
  a, b = lean['layers']['up']['kernel'].a, lean['layers']['down']['kernel'].a
  assert not bool(jnp.allclose(a * 8 ** .5, b[:8] * 16 ** .5))


@pytest.mark.parametrize('step', [
    dict(method='nope'), dict(method='rtn'), dict(method='rtn', spec='w4a16', bits=4)])
def test_unknown_methods_and_settings_are_refused(params, step):
  with pytest.raises(InputError, match='there are|takes'):
    methods.apply(params, (dict(where='.*', **step),))


def test_sizes_count_what_is_stored(params):
  lean = methods.apply(params, (dict(where='layers/.*', method='rtn', spec='w4a16-g8'),))
  # 256 weights in half a byte; a bfloat16 scale for 8 of them; a float32 norm of 8
  assert tree.nbytes(lean) == 256 // 2 + 256 // 8 * 2 + 8 * 4
  assert tree.parameters(lean) == tree.parameters(params) == 256 + 8
