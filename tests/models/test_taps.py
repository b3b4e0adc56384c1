"""What models show of their insides: right, whatever the layout, and free where not asked for."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lean_jax.distillation.losses import tapped
from lean_jax.distillation.start import take_layers
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig, empty_cache
from lean_jax.models.encoder import EncoderConfig
from lean_jax.models.segments import converted
from lean_jax.nn.attention import HIDDEN
from lean_jax.nn.latent import LatentOptions
from lean_jax.nn.taps import HEADS, SCORES, STATES, TAPS

SMALL = dict(vocabulary=40, width=16, layers=2, heads=4, groups=2, head_width=8, hidden=24,
             context=32)
NEAR = Layer(window=2)
CONFIGS = dict(
    decoder=DecoderConfig(**SMALL),
    segments=DecoderConfig(**SMALL | dict(layers=3), kinds=(Layer(), NEAR, NEAR), remat=True),
    latent=DecoderConfig(**SMALL, kinds=(Layer('latent'),) * 2, latent=LatentOptions(
        query_rank=None, rank=8, plain_width=8, rope_width=4, value_width=6)),
    encoder=EncoderConfig(**SMALL))
TOKENS = np.random.default_rng(0).integers(1, 40, (2, 6))
MASK = np.arange(6)[None] < np.array([6, 4])[:, None]


def fresh(config):
  return jax.jit(config.module.init)(jax.random.key(0), TOKENS)['params']


def shown(config, params, taps=TAPS, mask=None):
  run = jax.jit(lambda p: config.module.apply({'params': p}, TOKENS, mask=mask,
                                              mutable=list(taps)))
  outputs, found = run(params)
  return outputs[0], tapped(config, found)


@pytest.mark.parametrize(('name', 'scan'), [
    *((name, True) for name in CONFIGS), ('encoder', False)])
def test_the_program_is_the_one_without_taps_where_none_are_asked_for(name, scan, monkeypatch):
  config = dataclasses.replace(CONFIGS[name], scan_layers=scan)
  params = jax.eval_shape(config.module.init, jax.random.key(0), TOKENS)['params']

  def text():
    loss = lambda p: config.module.apply({'params': p}, TOKENS)[0].sum()
    return jax.jit(jax.grad(loss)).lower(params).as_text()
  with_taps = text()
  monkeypatch.setattr(nn.Module, 'sow', lambda *args, **kw: pytest.fail('sown')
                      if args[1] != STATES else False)
  assert text() == with_taps


@pytest.mark.parametrize('name', ['segments', *(pytest.param(name, marks=pytest.mark.slow)
                                                for name in CONFIGS if name != 'segments')])
def test_stacked_layers_show_what_written_out_ones_do_and_outputs_stay(name):
  config = CONFIGS[name]
  params = fresh(config)
  plain, _ = shown(config, params, [], MASK)
  outputs, one = shown(config, params, mask=MASK)
  _, other = shown(*converted(config, params, not config.scan_layers), mask=MASK)
  np.testing.assert_allclose(outputs, plain, atol=1e-5)           # float32 of order one
  assert len(one.layers) == config.layers
  for a, b in zip(one.layers, other.layers):
    assert sorted(a) == sorted(b) == ['hidden', 'keys', 'queries', 'scores', 'values']
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_hidden_states_are_those_of_the_model_cut_there():
  config = CONFIGS['segments']
  params = fresh(config)
  _, seen = shown(config, params, [STATES])
  np.testing.assert_array_equal(seen.embedding, params['embed']['table'].value[TOKENS])
  assert [list(layer) for layer in seen.layers] == [['hidden']] * 3
  cut, some = take_layers(dataclasses.replace(config, final_norm=False), params, (0, 1))
  want = jax.jit(lambda p: cut.module.apply({'params': p}, TOKENS, method='hidden')[0])(some)
  np.testing.assert_allclose(seen.layers[1]['hidden'], want, atol=1e-5)
  assert not np.allclose(seen.layers[0]['hidden'], want, atol=.1)


@pytest.mark.parametrize('name', ['segments', 'encoder'])
def test_scores_are_of_the_queries_and_keys_shown_and_hide_what_is_not_seen(name):
  config = CONFIGS[name]
  _, seen = shown(config, fresh(config), [HEADS, SCORES], MASK)
  distance = np.arange(6)[:, None] - np.arange(6)[None]
  for layer, kind in zip(seen.layers, config.each):
    q, k = np.asarray(layer['queries']), np.repeat(layer['keys'], 2, axis=2)
    assert layer['values'].shape == (2, 6, 2, 8)
    visible = np.broadcast_to(MASK[:, None, None], (2, 4, 6, 6))
    if config.causal:
      visible = visible & (distance >= 0)
    if kind.window is not None:
      visible = visible & (np.abs(distance) < kind.window)
    want = np.where(visible, np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(8), HIDDEN)
    np.testing.assert_allclose(layer['scores'], want, atol=1e-5)


def test_decoding_through_a_cache_shows_no_attention():
  config = CONFIGS['decoder']
  params = jax.eval_shape(config.module.init, jax.random.key(0), TOKENS)['params']
  _, found = jax.eval_shape(lambda p, c: config.module.apply(
      {'params': p}, TOKENS, c, 0, mutable=list(TAPS)), params, empty_cache(config, 2, 8))
  assert set(found) == {STATES}


def test_making_parameters_makes_no_scores():
  made = jax.eval_shape(CONFIGS['decoder'].module.init, jax.random.key(0), jnp.asarray(TOKENS))
  assert not {HEADS, SCORES} & set(made)
