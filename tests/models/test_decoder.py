import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lean_jax.models.decoder import Decoder, DecoderConfig, empty_cache

TINY = DecoderConfig(vocabulary=32, width=16, layers=2, heads=4, groups=2, head_width=6, hidden=24,
                     context=16, tied=False)


@functools.cache
def fresh(config):
  module = Decoder(config)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  return module, params


def test_no_token_sees_a_later_one():
  module, params = fresh(TINY)
  tokens = jnp.arange(8)[None]                       # all different: a row of the table a position

  def logits(table):
    embed = dict(table=params['embed']['table'].replace_boxed(table))
    return module.apply({'params': params | dict(embed=embed)}, tokens)[0][0].sum(axis=-1)  # [T]

  slopes = jax.jit(jax.jacrev(logits))(params['embed']['table'].value)[:, :8]      # [T 8 D]
  seen = np.abs(slopes).max(axis=-1) > 0
  np.testing.assert_array_equal(seen, np.tril(np.ones((8, 8), bool)))


@pytest.mark.parametrize('tied', [True, False])
def test_decoding_with_a_cache_equals_the_full_forward_pass(tied):
  module, params = fresh(dataclasses.replace(TINY, tied=tied))
  tokens = jax.random.randint(jax.random.key(1), (3, 9), 0, 32)
  apply = jax.jit(module.apply)
  whole, none = apply({'params': params}, tokens)
  assert none is None
  cache, parts = empty_cache(module.config, 3, 16), []
  for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
    logits, cache = apply({'params': params}, tokens[:, start:stop], cache, start)
    parts.append(logits)
  # Sums of other lengths round differently: float32, logits of order one.
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-5)


def test_remat_changes_neither_logits_nor_gradients():
  tokens = jnp.arange(6)[None]
  out = []
  for remat in (False, True):
    module, params = fresh(dataclasses.replace(TINY, remat=remat))
    loss = lambda p, m=module: m.apply({'params': p}, tokens)[0].var()
    out.append(jax.jit(jax.value_and_grad(loss))(params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *out)


def test_taps_that_nobody_asks_for_cost_nothing(monkeypatch):
  module, params = fresh(TINY)
  text = lambda: jax.jit(lambda p, x: module.apply({'params': p}, x)[0]).lower(
      params, jnp.zeros((1, 4), jnp.int32)).as_text()
  tapped = text()
  monkeypatch.setattr(nn.Module, 'sow', lambda *args, **kw: False)
  assert text() == tapped


def test_taps_hold_the_hidden_states_of_all_layers():
  module, params = fresh(TINY)
  _, out = jax.eval_shape(lambda x: module.apply({'params': params}, x, mutable=['taps']),
                          jnp.zeros((3, 4), jnp.int32))
  assert out['taps']['layers']['hidden'][0].shape == (TINY.layers, 3, 4, TINY.width)


def test_bfloat16_computes_close_to_float32_and_trains_float32_parameters():
  module, params = fresh(TINY)
  tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, TINY.vocabulary)
  half = Decoder(dataclasses.replace(TINY, dtype='bfloat16'))
  run = lambda module: lambda p: module.apply({'params': p}, tokens)[0]
  want, got = run(module)(params), run(half)(params)
  assert got.dtype == jnp.float32
  # eight bits of mantissa, through a few layers
  assert float(jnp.abs(got - want).max()) < .05 * float(jnp.abs(want).max())
  grads = jax.grad(lambda p: run(half)(p).sum())(params)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype('float32')}
