"""Learned maps of layers find the right ones; the sides of encoder-decoders are looked at alone."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lean_jax as lean
from lean_jax.distillation.hidden import hidden_cosine, hidden_mse
from lean_jax.distillation.losses import learned, parsed, tapped, weighted
from lean_jax.distillation.start import take_layers
from lean_jax.errors import InputError
from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.nn.taps import STATES
from lean_jax.objectives.forward import run
from lean_jax.training.loop import fit

SHAPE = dict(vocabulary=32, width=16, heads=2, groups=2, head_width=8, hidden=16, context=8)
TEACHER = DecoderConfig(layers=4, **SHAPE)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 8))
BATCH = dict(tokens=jnp.asarray(TOKENS), mask=jnp.ones((4, 8), bool).at[1, 5:].set(False))


@pytest.fixture(scope='module')
def teacher():
  return jax.jit(TEACHER.module.init)(jax.random.key(1), TOKENS)['params']


def test_a_learned_map_finds_the_layers_that_a_student_has(teacher):
  """The student is the teacher's first layers, but the map starts even and knows nothing of it."""
  student, params = take_layers(TEACHER, teacher, (0, 1, 2))
  terms = parsed(student, TEACHER, [dict(kind='hidden', layers='learned')])
  start = learned(terms, jax.random.key(0))
  assert jax.tree.map(jnp.shape, start) == dict(layer_maps=dict(hidden=(3, 4)))
  loss, seen = weighted(student.module, TEACHER.module, terms), []
  end, _ = fit(loss, {**params, **start}, {k: BATCH for k in range(40)}, optax.adam(.3), steps=40,
               trainable='layer_maps/.*', frozen=dict(teacher_params=teacher),
               hooks=[lambda step, m: seen.append(float(m['hidden']))])
  weights = jax.nn.softmax(end['layer_maps']['hidden'])
  np.testing.assert_array_equal(np.argmax(weights, axis=1), [0, 1, 2])
  assert float(np.min(np.max(weights, axis=1))) > .8 and seen[-1] < .05 * seen[0]


@pytest.mark.slow
@pytest.mark.parametrize('distance', ['mse', 'cosine'])
def test_it_is_the_mean_over_layers_of_each_mixture(teacher, distance):
  student = dataclasses.replace(TEACHER, layers=2, width=8)
  params = jax.jit(student.module.init)(jax.random.key(0), TOKENS)['params']
  terms = parsed(student, TEACHER, [dict(kind='hidden', layers='learned', distance=distance)])
  own = learned(terms, jax.random.key(0))
  own['layer_maps']['hidden'] = jax.random.normal(jax.random.key(5), (2, 4))
  loss = weighted(student.module, TEACHER.module, terms)
  of = lambda p, t: loss(p, BATCH, None, teacher_params=t)[0]
  value, (mine, theirs) = jax.jit(jax.value_and_grad(of, (0, 1)))({**params, **own}, teacher)
  one, other = (tapped(c, jax.jit(lambda p, c=c: run(c.module, p, BATCH, (STATES,))[2])(p)).layers
                for c, p in ((student, params), (TEACHER, teacher)))
  compare = dict(mse=hidden_mse, cosine=hidden_cosine)[distance]
  weights = np.asarray(jax.nn.softmax(own['layer_maps']['hidden']))
  want = np.mean([compare(s['hidden'], sum(w * t['hidden'] for w, t in zip(row, other)),
                          BATCH['mask'], own['projections']['hidden'])
                  for s, row in zip(one, weights)])
  np.testing.assert_allclose(value, want, rtol=1e-5)
  assert not any(g.any() for g in jax.tree.leaves(theirs))
  assert mine['layer_maps']['hidden'].any() and mine['projections']['hidden'].any()


def pair(layers, width, **more):
  c = dict(SHAPE, layers=layers, width=width)
  return EncoderDecoderConfig(encoder=StackConfig(causal=False, **c | more),
                              decoder=DecoderConfig(cross=True, **c | more), start=1)


SIDES = [dict(kind='hidden', side='encoder'), dict(kind='hidden', name='wrote', side='decoder'),
         dict(kind='attention', side='decoder', distance='kl'),
         dict(kind='embedding', side='encoder')]


@pytest.mark.slow
def test_sides_of_pairs_are_compared_with_their_own_masks():
  student, teacher = pair(1, 16), pair(1, 16, scan_layers=False)
  batch = dict(BATCH, decoder_tokens=BATCH['tokens'][:, :6],
               decoder_mask=jnp.ones((4, 6), bool).at[2, 3:].set(False))
  params, known = (jax.jit(c.module.init)(jax.random.key(k), TOKENS, TOKENS[:, :6])['params']
                   for k, c in enumerate((student, teacher)))
  loss = weighted(student.module, teacher.module, parsed(student, teacher, SIDES))
  total, values = jax.jit(lambda p, t: loss(p, batch, None, teacher_params=t))(params, known)
  taps = lambda p, c: run(c.module, p, batch, (STATES,))[2]
  shown = jax.jit(lambda p, t: (taps(p, student), taps(t, teacher)))(params, known)
  for name, side, mask in (('hidden', 'encoder/', 'mask'), ('wrote', 'decoder/', 'decoder_mask')):
    one, other = (tapped(c, s, side).layers[-1]['hidden']
                  for c, s in zip((student, teacher), shown))
    np.testing.assert_allclose(values[name], hidden_mse(one, other, batch[mask]), rtol=1e-5)
  assert values['attention'] > 0 and values['embedding'] > 0
  np.testing.assert_allclose(total, sum(values.values()), rtol=1e-5)


@pytest.mark.parametrize(('student', 'given', 'says'), [
    (pair(1, 16), dict(), "needs side='encoder' or side='decoder', got None"),
    (pair(1, 16), dict(side='left'), "'left'"),
    (TEACHER, dict(), 'a stack with those of a pair')])
def test_a_side_that_there_is_not_is_refused(student, given, says):
  with pytest.raises(InputError, match=says):
    parsed(student, pair(2, 16), [dict(kind='hidden', **given)])
  with pytest.raises(InputError, match="side 'encoder'.*one side"):
    parsed(TEACHER, TEACHER, [dict(kind='hidden', side='encoder')])


@pytest.mark.slow
def test_distill_learns_the_map_and_leaves_it_behind(tiny_model, tmp_path):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 60)
  out = lean.distill(tiny_model, tmp_path / 'text.txt', steps=2, batch=4, window=16, peak=1e-2,
                     losses=[dict(kind='hidden', layers='learned')])
  assert sorted(out.params) == ['embed', 'layers', 'norm']
