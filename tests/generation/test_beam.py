"""Beam search: what it finds, and what it cannot be asked."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation import beam, generate
from lean_jax.models.decoder import DecoderConfig

CONFIG = DecoderConfig(vocabulary=7, width=16, layers=2, heads=2, groups=1, head_width=8,
                       hidden=24, context=32, tied=False)
PROMPTS = [np.array([1, 2, 3]), np.array([4])]


@pytest.fixture(scope='module')
def model():
  module = CONFIG.module
  params = jax.jit(module.init)(jax.random.key(3), jnp.zeros((1, 1), jnp.int32))['params']
  params['head']['kernel'] = jax.tree.map(lambda x: 4 * x, params['head']['kernel'])
  return module, params


def log_probability(model, prompt, texts):
  """Of each of `texts` [N n] after a prompt."""
  module, params = model
  whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
  logits = jax.nn.log_softmax(jax.jit(module.apply)({'params': params}, whole)[0])
  each = np.take_along_axis(np.asarray(logits)[:, :-1], whole[:, 1:, None], axis=2)[:, :, 0]
  return each[:, len(prompt) - 1:].sum(axis=1)


def test_one_beam_is_greedy(model):
  ids, lengths = beam.search(*model, PROMPTS, tokens=6, beams=1)
  np.testing.assert_array_equal(ids[:, 0], generate(*model, PROMPTS, tokens=6))
  assert (lengths == 6).all()
  end = int(ids[0, 0, 3])
  ids, lengths = beam.search(*model, PROMPTS[:1], tokens=6, beams=1, ends=[end])
  np.testing.assert_array_equal(ids[0, 0, :lengths[0, 0]],
                                generate(*model, PROMPTS[0], tokens=6, eos=end))


def test_as_many_beams_as_texts_find_the_most_probable_ones(model):
  ids, _ = beam.search(*model, PROMPTS, tokens=2, beams=7)
  texts = np.array(list(itertools.product(range(7), repeat=2)))
  for prompt, found in zip(PROMPTS, ids):
    order = np.argsort(-log_probability(model, prompt, texts))
    np.testing.assert_array_equal(found, texts[order[:7]])


def test_a_search_in_a_batch_is_that_of_its_rows(model):
  ids, lengths = beam.search(*model, PROMPTS, tokens=6, beams=3, ends=[5])
  for row, prompt in enumerate(PROMPTS):
    alone, own = beam.search(*model, [prompt], tokens=6, beams=3, ends=[5])
    np.testing.assert_array_equal(own[0], lengths[row])
    for k, n in enumerate(own[0]):
      np.testing.assert_array_equal(alone[0, k, :n], ids[row, k, :n])


@pytest.mark.parametrize(('settings', 'message'), [
    (dict(beams=0), 'beams 0'), (dict(beams=8), 'from 1 to 7'), (dict(beams=1.5), 'beams 1.5'),
    (dict(length_penalty=float('nan')), 'length_penalty nan'), (dict(tokens=0), '0 tokens'),
    (dict(tokens=30), 'the context has 32'),
    (dict(repetition_penalty=0), 'repetition_penalty 0')])
def test_what_cannot_be_searched_is_one_line(model, settings, message):
  with pytest.raises(InputError, match=message) as error:
    beam.search(*model, PROMPTS, **dict(tokens=4, beams=2) | settings)
  assert '\n' not in str(error.value)
