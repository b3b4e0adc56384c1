"""What an encoder and a decoder write of a source."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation import generate
from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.relative import RelativeOptions

BOTH = dict(vocabulary=64, width=16, heads=2, groups=2, head_width=6, hidden=24,
            attention=AttentionOptions(ropes=()), relative=RelativeOptions(8, 20))
CONFIG = EncoderDecoderConfig(
    encoder=StackConfig(layers=2, causal=False, context=40, **BOTH),
    decoder=DecoderConfig(layers=2, cross=True, tied=False, context=24, **BOTH), start=3)
SOURCES = np.random.default_rng(0).integers(0, 64, (3, 9))


@pytest.fixture(scope='module')
def params():
  module = CONFIG.module
  ids = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(3), ids, ids)['params']
  # Larger, so that greedy choices are clear and many, and the source is heard.
  decoder, larger = params['decoder'], lambda w, by: jax.tree.map(lambda x: by * x, w)
  decoder['head'] = larger(decoder['head'], 10)
  decoder['layers']['mlp'] = larger(decoder['layers']['mlp'], 2)
  decoder['layers']['cross'] = larger(decoder['layers']['cross'], 2)
  return params


def write(params, source=SOURCES, change=None, **kw):
  config = dataclasses.replace(CONFIG, **(change or {}))
  return generate(config.module, params, source, **kw)


@pytest.mark.parametrize('length', [1, 9, 17])
def test_greedy_tokens_are_the_most_probable_of_the_whole_target(params, length):
  source = np.random.default_rng(1).integers(0, 64, (2, length))
  out = write(params, source, tokens=8)
  target = np.concatenate([np.full((2, 1), CONFIG.start), out], axis=1)
  logits = jax.jit(CONFIG.module.apply)({'params': params}, source, target)[0]
  np.testing.assert_array_equal(logits.argmax(axis=-1)[:, :-1], out)
  assert len(set(out.ravel().tolist())) > 2


def test_a_batch_is_its_rows_and_sources_differ(params):
  out = write(params, tokens=6)
  np.testing.assert_array_equal([write(params, row, tokens=6) for row in SOURCES], out)
  assert len({tuple(row) for row in out.tolist()}) == 3


def test_sources_of_different_lengths_are_read_as_each_alone(params):
  sources = [SOURCES[0], SOURCES[1, :2], SOURCES[2, :5]]
  out = write(params, sources, tokens=6)
  np.testing.assert_array_equal([write(params, row, tokens=6) for row in sources], out)


def test_several_targets_of_a_source_differ(params):
  out = write(params, SOURCES[:2], tokens=6, temperature=2., key=jax.random.key(0), n=3)
  assert out.shape == (2, 3, 6)
  assert len({tuple(row) for row in out.reshape(6, 6)}) == 6
  one = write(params, SOURCES[0], tokens=6, temperature=2., key=jax.random.key(0), n=3)
  np.testing.assert_array_equal(one, out[0])


def test_a_target_ends_with_its_end_token(params):
  whole = write(params, tokens=8)
  end = whole[0, 2]
  ended = write(params, SOURCES[0], tokens=8, eos=end)
  np.testing.assert_array_equal(ended, whole[0, :whole[0].tolist().index(end) + 1])


def test_samples_follow_the_key_and_the_settings(params):
  sample = lambda seed, **kw: write(params, tokens=8, temperature=1., key=jax.random.key(seed),
                                    **kw)
  np.testing.assert_array_equal(sample(0), sample(0))
  assert (sample(0) != sample(1)).any()
  np.testing.assert_array_equal(sample(0, top_k=1), write(params, tokens=8))


def test_forced_tokens_are_the_first_and_the_last(params):
  free = write(params, tokens=5)
  forced = write(params, tokens=5, change=dict(first=11, last=7))
  assert (forced[:, 0] == 11).all() and (forced[:, -1] == 7).all()
  assert (free[:, 0] != 11).all() and (free[:, -1] != 7).all()
  np.testing.assert_array_equal(write(params, tokens=1, change=dict(first=11)), [[11]] * 3)
  np.testing.assert_array_equal(write(params, tokens=5, change=dict(last=7))[:, :-1], free[:, :-1])


def test_a_row_that_ended_keeps_its_end(params):
  end = write(params, tokens=5)[0, 1]
  out = write(params, tokens=5, eos=end, change=dict(last=7))
  assert out[0, -1] == end
  going = ~np.isin(out[:, :-1], end).any(axis=1)
  assert going.any() and (out[going, -1] == 7).all()


def test_the_context_is_the_targets_and_the_encoders_the_sources(params):
  assert write(params, np.arange(40), tokens=23).shape == (23,)
  with pytest.raises(InputError, match='41 tokens, the model reads 40'):
    write(params, np.arange(41), tokens=2)
  with pytest.raises(InputError, match='the context has 24'):
    write(params, tokens=24)
