import dataclasses

import jax
import numpy as np
import pytest

from lean_jax.interop.hf import configured
from lean_jax.models.cache import empty_cache
from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.models.segments import restacked, unstacked
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.relative import RelativeOptions
from lean_jax.training.mesh import make_mesh, on, put_batch, shardings

BOTH = dict(vocabulary=40, width=16, heads=2, groups=2, head_width=6, hidden=24, context=32,
            attention=AttentionOptions(ropes=()), relative=RelativeOptions(8, 20))
CONFIG = EncoderDecoderConfig(
    encoder=StackConfig(layers=2, causal=False, **BOTH),
    decoder=DecoderConfig(layers=3, cross=True, **BOTH), start=0)
draw = lambda seed, T: np.random.default_rng(seed).integers(1, 40, (4, T))
SOURCE, TARGET = draw(0, 9), draw(1, 7)
MASK = np.arange(9)[None] < np.array([9, 6, 9, 2])[:, None]


@pytest.fixture(scope='module')
def model():
  """(params, the jitted module)."""
  module = CONFIG.module
  params = jax.jit(module.init)(jax.random.key(0), SOURCE, TARGET)['params']
  return params, jax.jit(lambda p, *given: module.apply({'params': p}, *given))


def near(one, other):
  # float32, logits of order one.
  np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_target_sees_all_of_the_source_and_none_of_what_follows(model):
  params, run = model
  logits, _ = run(params, SOURCE, TARGET)
  later = TARGET.copy()
  later[:, 4] = (later[:, 4] + 1) % 40
  changed, _ = run(params, SOURCE, later)
  moved = np.abs(changed - logits).max(axis=(0, 2)) > 1e-6
  assert moved.tolist() == [False] * 4 + [True] * 3
  for place in (0, 8):
    other = SOURCE.copy()
    other[:, place] = (other[:, place] + 1) % 40
    assert (np.abs(run(params, other, TARGET)[0] - logits).max(axis=2) > 1e-6).all()


def test_masked_tokens_of_a_source_are_not_seen(model):
  params, run = model
  logits, _ = run(params, SOURCE, TARGET, MASK)
  other, _ = run(params, np.where(MASK, SOURCE, 5), TARGET, MASK)
  near(other, logits)
  assert np.abs(run(params, SOURCE, TARGET)[0] - logits)[1].max() > 1e-3


@pytest.mark.parametrize('room', [9, 14])
def test_a_cache_keeps_what_is_needed_of_the_source(model, room):
  params, run = model
  whole, _ = run(params, SOURCE, TARGET, MASK)
  cache, parts = empty_cache(CONFIG, 4, 10, room), []
  for start, end in ((0, 2), (2, 3), (3, 7)):
    here = (SOURCE, MASK) if start == 0 else (None, None)
    logits, cache = run(params, here[0], TARGET[:, start:end], here[1], None, cache, start)
    parts.append(logits)
  near(np.concatenate(parts, axis=1), whole)
  assert cache['source'].sum() == MASK.sum()


def test_one_table_of_embeddings_serves_both_stacks_and_the_head(model):
  params, _ = model
  assert set(params) == {'embed', 'encoder', 'decoder'}
  assert not {'embed', 'head'} & (set(params['encoder']) | set(params['decoder']))


@pytest.mark.parametrize('change', [dict(remat=True), dict(scan_layers=False)])
def test_settings_change_no_result(model, change):
  params, run = model
  config = configured(CONFIG, **change)
  own = {k: dict(params[k], layers=restacked(
      getattr(config, k), unstacked(getattr(CONFIG, k), params[k]['layers'])))
      for k in ('encoder', 'decoder')}
  there = jax.jit(lambda p: config.module.apply({'params': p}, SOURCE, TARGET, MASK)[0])
  near(there(params | own), run(params, SOURCE, TARGET, MASK)[0])


def test_logits_on_a_mesh_are_those_on_one_device(model):
  params, run = model
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  with on(mesh):
    there = jax.device_put(params, shardings(params, mesh))
    batch = put_batch(dict(tokens=SOURCE, decoder_tokens=TARGET, mask=MASK), mesh)
    logits = jax.jit(lambda p, b: CONFIG.module.apply({'params': p}, **b)[0])(there, batch)
  near(logits, run(params, SOURCE, TARGET, MASK)[0])


def test_a_config_says_of_itself_what_a_decoders_does():
  assert (CONFIG.vocabulary, CONFIG.context, CONFIG.dtype, CONFIG.tied) == (40, 32, 'float32', True)
  other = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tied=False))
  assert not other.tied
