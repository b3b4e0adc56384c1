import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.data.windows import Windows
from lean_jax.errors import InputError
from lean_jax.evaluation.perplexity import perplexity
from lean_jax.evaluation.speed import speed
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.tree import nbytes

CONFIG = DecoderConfig(vocabulary=40, width=16, layers=2, heads=2, groups=1, head_width=8,
                       hidden=24, context=32)


@pytest.fixture(scope='module')
def model():
  module = Decoder(CONFIG)
  return module, jax.jit(module.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))['params']


def windows_of(array):
  return Windows(array.astype(np.uint16), stream_tokens=array.size + 3, bytes=700, documents=2,
                 fingerprint='')


@pytest.mark.parametrize('tied', [True, False])
def test_perplexity_is_that_of_the_logits_in_float64(tied):
  module = Decoder(CONFIG.__class__(**vars(CONFIG) | dict(tied=tied)))
  params = jax.jit(module.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))['params']
  tokens = np.random.default_rng(0).integers(0, 40, (5, 9))
  logits = np.asarray(jax.jit(module.apply)({'params': params}, tokens)[0], np.float64)
  losses = [-logits[w, t, tokens[w, t + 1]] + math.log(sum(math.exp(x) for x in logits[w, t]))
            for w in range(5) for t in range(8)]
  expected = sum(losses) / 40
  out = perplexity(module, params, windows_of(tokens), batch=2)
  assert out['tokens'] == 40
  # Each token's loss is float32, of order four.
  assert out['nll'] == pytest.approx(expected, rel=1e-6)
  assert out['perplexity'] == pytest.approx(math.exp(expected), rel=1e-5)
  assert out['bits_per_byte'] == pytest.approx(expected / math.log(2) * 48 / 700, rel=1e-6)
  assert out['seconds'] > 0


def test_the_batch_changes_nothing(model):
  windows = windows_of(np.random.default_rng(1).integers(0, 40, (5, 8)))
  one, *others = (perplexity(*model, windows, batch=n)['nll'] for n in (1, 2, 5, 16))
  assert others == pytest.approx([one] * 3, rel=1e-6)


def test_progress_counts_windows(model):
  seen = []
  perplexity(*model, windows_of(np.zeros((5, 4))), batch=2,
             progress=lambda done, total, what: seen.append((done, total)))
  assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_hopeless_model_has_an_infinite_perplexity(model):
  module, params = model
  wild = params | dict(embed=jax.tree.map(lambda x: x * 1e4, params['embed']))
  assert perplexity(module, wild, windows_of(np.arange(8).reshape(2, 4)))['perplexity'] == math.inf


@pytest.mark.parametrize(('array', 'batch', 'message'), [
    (np.zeros((2, 33)), 1, 'windows of 33 tokens; give 2 to 32'),
    (np.zeros((2, 1)), 1, 'windows of 1 tokens'),
    (np.full((2, 4), 40), 1, 'token 40, the model has 0 to 39'),
    (np.zeros((2, 4)), 0, 'batch of 0'),
])
def test_windows_that_do_not_fit_are_refused(model, array, batch, message):
  with pytest.raises(InputError, match=message):
    perplexity(*model, windows_of(array), batch=batch)


def test_speed_counts_tokens_and_the_memory_of_the_weights_and_the_cache(model):
  out = speed(*model, prompt=8, decode=4, batch=2, repeats=1)
  assert out['prefill_tokens_per_second'] > 0
  assert out['decode_tokens_per_second'] > 0
  cache = 2 * CONFIG.layers * 2 * 16 * CONFIG.groups * CONFIG.head_width * 4
  assert nbytes(model[1]) + cache < out['peak_memory_bytes'] < 10 * (nbytes(model[1]) + cache)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(prompt=0), 'prompt 0'), (dict(decode=1), 'decode 1; give 2'), (dict(batch=0), 'batch 0'),
    (dict(repeats=0), 'repeats 0'), (dict(prompt=30, decode=3), 'are 33, the context has 32')])
def test_speeds_that_cannot_be_measured_are_refused(model, change, message):
  with pytest.raises(InputError, match=message):
    speed(*model, **(dict(prompt=4, decode=2, batch=1) | change))
