"""Distillation on what the student writes: whose tokens these are, what counts, and a resume."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.distillation.losses import parsed, weighted
from lean_jax.distillation.on_policy import completed, rollout
from lean_jax.distillation.soft_labels import soft_labels
from lean_jax.errors import InputError
from lean_jax.generation import generate
from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.nn.rope import Rope
from lean_jax.nn.rope_scaling import LongRope
from lean_jax.objectives.forward import forward, targets
from lean_jax.pipeline.variants import _on_policy, losses
from lean_jax.training.mesh import make_mesh
from lean_jax.training.recipe import train

CONFIG = DecoderConfig(vocabulary=24, width=16, layers=1, heads=2, groups=1, head_width=8,
                       hidden=16, context=16)
MODULE = CONFIG.module
TOKENS = np.random.default_rng(0).integers(2, 24, (4, 12)).astype(np.int32)
BATCH = dict(tokens=jnp.asarray(TOKENS))
NONE = np.array([-1], np.int32)      # no token ends a text
LOSSES = [dict(kind='jsd', beta=.3), dict(kind='cross_entropy')]


class Same:
  """Batches of some rows, by the step."""
  fingerprint = 'same'

  def __getitem__(self, step):
    return dict(tokens=np.roll(TOKENS, step, axis=0))


@pytest.fixture(scope='module')
def models():
  # Wide logits, so that the most probable token is no tie.
  made = [jax.jit(MODULE.init)(jax.random.key(k), TOKENS)['params'] for k in (0, 1)]
  return [jax.tree.map(lambda x: 2 * x, p) for p in made]


def run(models, steps=6, **settings):
  """The trained student."""
  return train(MODULE, models[0], Same(), **dict(
      steps=steps, peak=1e-2, decay='constant', losses=LOSSES, teacher=(MODULE, models[1]), seed=2,
      log_every=1, accumulate=2) | settings)[0]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_of_the_most_probable_tokens_it_is_what_generation_gives(models):
  out = completed(MODULE, models[0], BATCH, jax.random.key(0), NONE, tokens=5, temperature=0.)
  want = generate(MODULE, models[0], TOKENS[:, :7], tokens=5)
  np.testing.assert_array_equal(out['tokens'], np.concatenate([TOKENS[:, :7], want], axis=1))
  np.testing.assert_array_equal(out['labels'][:, 6:11], want)
  assert (np.delete(np.asarray(out['labels']), range(6, 11), axis=1) == -1).all()
  assert out['mask'].all() and out['sampled'].all()


def test_nothing_counts_after_an_end(models):
  plain = completed(MODULE, models[0], BATCH, jax.random.key(0), NONE, tokens=8, temperature=1.)
  written = np.asarray(plain['tokens'][:, 4:])
  end = written[0, 3]
  out = completed(MODULE, models[0], BATCH, jax.random.key(0), np.array([end]), tokens=8,
                  temperature=1.)
  for row, labels, mask in zip(written, out['labels'], out['mask']):
    count = list(row).index(end) + 1 if end in row else 8
    np.testing.assert_array_equal(labels, [-1] * 3 + list(row[:count]) + [-1] * (9 - count))
    np.testing.assert_array_equal(mask, np.arange(12) < 4 + count)
  assert (np.asarray(out['labels'])[0] >= 0).sum() <= 4


def test_a_prompt_is_what_stands_before_the_labels(models):
  labels = np.full((4, 12), -1)
  for row, first in enumerate((2, 4, 0, 9)):
    labels[row, first:11] = 1
  batch = dict(BATCH, labels=jnp.asarray(labels))
  out = completed(MODULE, models[0], batch, jax.random.key(0), NONE, tokens=6, temperature=0.)
  prompts = [row[begin:end] for row, (begin, end) in zip(
      TOKENS, ((0, 3), (0, 5), (0, 1), (4, 10)))]                  # the last one's end
  for row, (prompt, want) in enumerate(zip(prompts, generate(MODULE, models[0], prompts,
                                                             tokens=6))):
    np.testing.assert_array_equal(out['tokens'][row, 6:], want)
    np.testing.assert_array_equal(out['mask'][row], np.arange(12) >= 6 - len(prompt))
    np.testing.assert_array_equal(out['tokens'][row][out['mask'][row]], [*prompt, *want])


@pytest.mark.slow
def test_tokens_are_of_the_students_distribution(models):
  n, temperature = 4096, 1.5
  batch = dict(tokens=jnp.tile(BATCH['tokens'][:1], (n, 1)))
  out = completed(MODULE, models[0], batch, jax.random.key(3), NONE, tokens=1,
                  temperature=temperature)
  logits = jax.jit(lambda p: forward(MODULE, p, dict(tokens=BATCH['tokens'][:1, :11]))[0][0, -1])(
      models[0])
  p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
  seen = np.bincount(out['tokens'][:, -1], minlength=24) / n
  assert (np.abs(seen - p) < 4.5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()   # of 24: 1 in 6000


@pytest.mark.slow
def test_losses_are_of_the_completion_and_no_gradient_goes_through_the_sampling(models):
  loss = weighted(MODULE, MODULE, parsed(CONFIG, CONFIG, LOSSES))
  write = lambda p: completed(MODULE, p, BATCH, jax.random.key(0), np.array([3]), tokens=8,
                              temperature=1.)
  own = write(models[0])
  of = lambda p, batch: loss(p, batch, None, teacher_params=models[1])
  (value, values), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(models[0], own)
  through = jax.jit(jax.grad(lambda p: of(p, write(p))[0]))(models[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, through)
  seen = {k: own[k] for k in ('tokens', 'mask')}
  y, target = jax.jit(lambda models: [forward(MODULE, p, seen)[0] for p in models])(models)
  counted = targets(own)[1]
  want = soft_labels(y, target, counted, temperature=1., kind='jsd', beta=.3)
  np.testing.assert_allclose(value, want, rtol=2e-5)
  assert list(values) == ['jsd']                       # its own words are no labels


def test_fraction_0_is_the_run_without(models):
  same(run(models, on_policy=dict(tokens=4, fraction=0)), run(models))


def test_a_resumed_run_ends_with_the_same_bits(models, tmp_path):
  settings = dict(on_policy=dict(tokens=8, fraction=.5, ends=[2]))
  whole = run(models, folder=tmp_path / 'whole', **settings)
  rows = [json.loads(r) for r in (tmp_path / 'whole/metrics.jsonl').read_text().splitlines()]
  assert {'cross_entropy' in row for row in rows} == {True, False}       # steps of both kinds
  seen = []
  with pytest.raises(lean.LeanError, match='stopped after step 3'):
    run(models, folder=tmp_path / 'run', stop=lambda: len(seen) == 2,
        hooks=[lambda step, m: seen.append(step)], **settings)
  same(run(models, folder=tmp_path / 'run', **settings), whole)


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same_run(models):
  given = dict(losses=LOSSES[:1], accumulate=1, steps=3,
               on_policy=dict(tokens=8, fraction=1, temperature=0.))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3),
               run(models, mesh=make_mesh(2, 2, 2), **given), run(models, **given))


@pytest.mark.slow
def test_an_encoder_and_a_decoder_write_targets_anew():
  stack = dict(vocabulary=24, width=16, layers=1, heads=2, groups=2, head_width=8, hidden=16,
               context=12)
  config = EncoderDecoderConfig(encoder=StackConfig(causal=False, **stack),
                                decoder=DecoderConfig(cross=True, **stack), start=1, first=5)
  module, mask = config.module, jnp.arange(12)[None] < jnp.array([12, 5, 7, 12])[:, None]
  batch = dict(BATCH, mask=mask, decoder_tokens=jnp.ones((4, 3), jnp.int32))
  params = jax.jit(module.init)(jax.random.key(0), TOKENS, jnp.ones((4, 3), jnp.int32))['params']
  out = completed(module, params, batch, jax.random.key(0), NONE, tokens=6, temperature=0.)
  want = generate(module, params, [t[:n] for t, n in zip(TOKENS, (12, 5, 7, 12))], tokens=7)
  np.testing.assert_array_equal(out['decoder_tokens'], np.pad(want, ((0, 0), (1, 0)),
                                                              constant_values=1))
  np.testing.assert_array_equal(out['labels'], np.pad(want[:, 1:], ((0, 0), (1, 1)),
                                                      constant_values=-1))
  np.testing.assert_array_equal(out['tokens'], TOKENS)
  with pytest.raises(InputError, match='a target has at most 10'):
    completed(module, params, batch, jax.random.key(0), NONE, tokens=11, temperature=0.)


@pytest.mark.slow
def test_distill_samples_up_to_the_tokenizers_end(tiny_model, tmp_path):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 60)
  say = lambda **own: lean.distill(
      tiny_model, tmp_path / 'text.txt', steps=2, batch=4, window=16, peak=1e-2,
      losses=[dict(kind='reverse_kl')], workdir=tmp_path / 'run', log_every=1, **own)
  learned = say(on_policy=dict(fraction=1, tokens=8, temperature=.7))
  rows = [json.loads(r) for r in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert all(np.isfinite(row['reverse_kl']) for row in rows)
  assert learned.config.layers == 1
  with pytest.raises(InputError, match='another settings'):
    say()


def test_a_config_has_it_beside_its_losses(tiny_model):
  c = dict(temperature=2., soft_weight=1., on_policy=dict(tokens=4))
  assert len(losses(c)) == 2
  config = type('Config', (dict,), dict(__getattr__=dict.__getitem__))(c)
  assert _on_policy(config, tiny_model) == dict(tokens=4, ends=[1])
  assert _on_policy(config, None) is None


LONG = dataclasses.replace(CONFIG.attention, ropes=(Rope(scaling=LongRope(
    short=(1.,) * 4, long=(2.,) * 4, original=8)),))
REFUSED = [
    (dict(tokens=0), 'tokens 0'), (dict(tokens=4, fraction=1.5), 'fraction 1.5'),
    (dict(tokens=4, fraction='half'), "fraction 'half'"), (dict(tokens=4, temperature=-1.), '-1'),
    (dict(tokens=4, temperature='hot'), 'hot'), (dict(fraction=.5), 'expected dict'),
    (dict(tokens=4, top_p=.5), 'expected dict'), (dict(tokens=4, fraction=1), 'leaves none'),
    (dict(tokens=12, fraction=.9), 'leave no prompt in rows of 12')]


@pytest.mark.parametrize(('given', 'says'), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_is_refused(models, given, says):
  with pytest.raises(InputError, match=says):
    run(models, on_policy=given)


def test_models_and_batches_that_cannot_be_sampled_from_are_refused(models):
  with pytest.raises(InputError, match='without a teacher'):
    run(models, teacher=None, losses=None, on_policy=dict(tokens=4))
  with pytest.raises(InputError, match='past 8 tokens'):
    rollout(dataclasses.replace(CONFIG, attention=LONG).module, tokens=4)
  with pytest.raises(InputError, match='labels are of whole rows'):
    completed(MODULE, models[0], dict(BATCH, labels=jnp.zeros((4,), jnp.int32)),
              jax.random.key(0), NONE, tokens=4, temperature=0.)
