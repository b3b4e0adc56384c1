"""A draft changes the speed of a text, not the text nor its distribution."""
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation import generate, loop, speculative
from lean_jax.generation.sampling import Sampling
from lean_jax.generation.writer import Writer
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.lstm import LSTMOptions
from lean_jax.nn.rope import Rope
from lean_jax.nn.rope_scaling import Dynamic, LongRope

LARGE = DecoderConfig(vocabulary=23, width=16, layers=2, heads=2, groups=1, head_width=8, hidden=24,
                      context=64, tied=False)
SMALL = dataclasses.replace(LARGE, layers=1)
LSTM = dataclasses.replace(LARGE, kinds=(Layer('lstm'),) * 2, lstm=LSTMOptions(inner=16))
PROMPTS = [np.array([1, 2, 3]), np.arange(9), np.array([7])]


@functools.cache
def model(config, seed=3, head=3):
  module = config.module
  params = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))['params']
  params['head']['kernel'] = jax.tree.map(lambda x: head * x, params['head']['kernel'])
  return module, params


def near(config, seed=3):
  """A draft that is right now and then: the model itself, its head shaken."""
  module, params = model(config, seed)
  noise = lambda x: x + jax.random.normal(jax.random.key(1), x.shape) * jnp.std(x) * .3
  return module, dict(params, head=jax.tree.map(noise, params['head']))


@pytest.mark.parametrize(('large', 'small'), [
    ('LARGE', 'SMALL'), ('LARGE', 'LSTM'), ('LSTM', 'SMALL'),
    pytest.param('LSTM', 'LSTM', marks=pytest.mark.slow)])
def test_greedy_text_is_the_models_own_whatever_the_draft(large, small):
  large, small = model(globals()[large]), near(globals()[small])
  free = generate(*large, PROMPTS, tokens=20)
  np.testing.assert_array_equal(generate(*large, PROMPTS, tokens=20, draft=small, ahead=3), free)
  eos = int(free[0, 6])
  np.testing.assert_array_equal(
      generate(*large, PROMPTS, tokens=20, draft=small, ahead=3, eos=eos),
      generate(*large, PROMPTS, tokens=20, eos=eos))


@pytest.mark.parametrize('config', [LARGE, LSTM], ids=['attention', 'state'])
def test_a_model_keeps_all_its_own_drafts(config):
  writer = Writer(*model(config), PROMPTS[:2], tokens=17, draft=model(config), ahead=4)
  writer.advance()
  proposed, kept = writer.drafts
  assert proposed == kept == 2 * 16            # the first token, and four blocks of five, cut
  np.testing.assert_array_equal(writer.ids(), generate(*model(config), PROMPTS[:2], tokens=17))


def test_some_drafts_are_kept_and_written_in_pieces_too():
  writer = Writer(*model(LARGE), PROMPTS[:1], tokens=30, draft=near(LARGE), ahead=4)
  while writer.advance(4):
    pass
  proposed, kept = writer.drafts
  assert 0 < kept < proposed
  np.testing.assert_array_equal(writer.ids(), generate(*model(LARGE), PROMPTS[:1], tokens=30))


def test_the_context_can_be_filled_where_positions_are_a_table():
  config = dataclasses.replace(LARGE, positions=64, attention=AttentionOptions(ropes=()))
  how = dict(tokens=55)
  np.testing.assert_array_equal(
      generate(*model(config), PROMPTS[1], draft=near(config), **how),
      generate(*model(config), PROMPTS[1], **how))


def test_a_repetition_penalty_sees_the_drafted_tokens():
  how = dict(tokens=18, repetition_penalty=1.5)
  np.testing.assert_array_equal(
      generate(*model(LARGE), PROMPTS, draft=near(LARGE), **how),
      generate(*model(LARGE), PROMPTS, **how))


def test_a_draft_with_another_padding_of_the_vocabulary_will_do():
  for V in (20, 30):
    draft = model(dataclasses.replace(SMALL, vocabulary=V))
    np.testing.assert_array_equal(generate(*model(LARGE), PROMPTS[2], tokens=12, draft=draft),
                                  generate(*model(LARGE), PROMPTS[2], tokens=12))


def test_tokens_are_kept_and_replaced_by_the_rule():
  n, V = 20_000, 6
  p, q = (np.random.default_rng(k).dirichlet(np.ones(V)).astype(np.float32) for k in (0, 1))
  keys = jnp.stack([jax.random.split(jax.random.key(k), n) for k in range(3)])
  tokens = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(q)))(keys[0])
  tile = lambda x, t: jnp.tile(jnp.log(x)[None, None], (n, t, 1))
  own, replacements = speculative.compared(tokens[:, None], tile(p, 2), tile(q, 1), Sampling(1.),
                                           keys)
  # Five standard deviations of a share of n.
  assert np.mean(own) == pytest.approx(np.minimum(p, q).sum(), abs=2.5 / n ** .5)
  found = np.where(own > 0, tokens, replacements(0))
  chi_square(np.bincount(found, minlength=V), p)
  chi_square(np.bincount(replacements(1), minlength=V), p)


def chi_square(found, probabilities):
  """Asserts that counts are of these probabilities: five standard deviations of the statistic."""
  expected = found.sum() * probabilities
  statistic, free = np.sum((found - expected) ** 2 / expected), len(found) - 1
  assert statistic < free + 5 * (2 * free) ** .5


@pytest.mark.parametrize('settings', [dict(), dict(temperature=1.5, top_k=3)])
@pytest.mark.parametrize('rows', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sampled_text_has_the_models_own_distribution(settings, rows):
  V, n, tokens = 4, 6000, 4
  config = dataclasses.replace(LARGE, vocabulary=V)
  (module, params), (small, small_params) = model(config, head=1), model(
      dataclasses.replace(SMALL, vocabulary=V), seed=5, head=1)
  sampling = Sampling(**dict(temperature=1.) | settings)
  ends, prompts = np.zeros((0,), np.int32), [np.array([1, 2])] * rows

  @jax.jit
  @jax.vmap
  def text(key):
    state = loop.begin(prompts, 16)
    state = state.replace(keys=jax.random.split(key, rows))
    draft = speculative.opened(small, small_params, state.ids, state.start, state.at, padded=16,
                               copies=1)
    state = loop.prefill(module, params, state, sampling, ends, padded=16)
    state, draft = speculative.decode(module, params, small, small_params, state, draft,
                                      2 + tokens, sampling, ends, ahead=2)
    return state.ids[:, 2:2 + tokens], draft.proposed, draft.kept
  found, proposed, kept = text(jax.random.split(jax.random.key(0), n))
  assert .1 < kept.sum() / proposed.sum() < .95
  texts = np.array(list(itertools.product(range(V), repeat=tokens)))
  whole = np.concatenate([np.tile([1, 2], (len(texts), 1)), texts], axis=1)
  logits = jax.jit(module.apply)({'params': params}, whole)[0][:, 1:-1]
  kept = logits
  if sampling.top_k:
    least = jnp.sort(logits, axis=-1)[:, :, -sampling.top_k, None]
    kept = jnp.where(logits < least, -jnp.inf, logits)
  each = jax.nn.log_softmax(kept / sampling.temperature)
  exact = np.exp(np.take_along_axis(np.asarray(each), texts[:, :, None], axis=2)[:, :, 0].sum(1))
  assert exact.sum() == pytest.approx(1, abs=1e-4)
  code = (np.asarray(found) * V ** np.arange(tokens)[::-1]).sum(axis=-1)
  for row in range(rows):
    counts = np.bincount(code[:, row], minlength=V ** tokens)
    assert counts[exact < 1e-9].sum() == 0
    common = exact * n > 5                                 # rarer ones counted as one
    joined = lambda x, common=common: np.append(x[common], x[~common].sum())
    chi_square(joined(counts), np.maximum(joined(exact), 1e-9))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(ahead=0), '0 tokens ahead'),
    (dict(draft=dataclasses.replace(SMALL, context=16)), 'context of the draft has 16'),
    (dict(draft=dataclasses.replace(SMALL, attention=AttentionOptions(ropes=(
        Rope(scaling=Dynamic(2., 8)),)))), 'longer than 8'),
    (dict(model=dataclasses.replace(LARGE, attention=AttentionOptions(ropes=(
        Rope(scaling=LongRope((1.,) * 4, (2.,) * 4, 12)),)))), 'longer than 12')])
def test_a_draft_that_does_not_fit_is_one_line(change, message):
  change = {k: model(v) if k != 'ahead' else v for k, v in change.items()}
  large = change.pop('model', model(LARGE))
  with pytest.raises(InputError, match=message) as error:
    generate(*large, PROMPTS[0], **dict(tokens=20, draft=model(SMALL)) | change)
  assert '\n' not in str(error.value)
