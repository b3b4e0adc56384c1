"""Training through the rounding: the papers' gradients, and what is trained is what is stored."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lean_jax import methods, tree
from lean_jax.distillation.losses import soft_and_hard
from lean_jax.errors import InputError
from lean_jax.kernels.fake_quant.api import learned_step
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.objectives.language_modeling import next_token
from lean_jax.quantization.ema import averaged, ema, fixed
from lean_jax.quantization.lsq import lsq, lsq_plus
from lean_jax.quantization.pact import clipped, pact
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import parse_spec
from lean_jax.training.loop import fit
from lean_jax.training.mesh import make_mesh
from lean_jax.training.optimizer import adamw
from lean_jax.training.recipe import train
from lean_jax.weights import Dense, Quantized

ROWS, COLUMNS = 12, 3


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape)


def dense(*shape, dims='io', seed=0):
  return Dense(jnp.asarray(draw(seed, *shape), jnp.float32), dims, (None,) * len(dims))


@pytest.mark.parametrize('text', ['w4a16', 'w2a16-sym', 'w3a16-g5', 'w4a16-tensor', 'w2a16-g6'])
def test_the_gradients_of_lsq_are_the_papers_in_float64(text):
  """LSQ, equation 3 and section 2.2; LSQ+, equations 5 and 6."""
  spec = parse_spec(text)
  group = spec.group or ROWS
  count = -(-ROWS // group)
  shape = (1, 1) if spec.tensor else (count, COLUMNS)
  v, up = draw(0, ROWS, COLUMNS), draw(1, ROWS, COLUMNS)
  step = np.full(shape, .375 if not spec.symmetric else .25 if spec.bits == 4 else .5)
  beta = None if spec.symmetric else np.full(shape, -.75)             # zero point 2
  given = [jnp.asarray(x, jnp.float32) if x is not None else None for x in (v, step, beta)]
  got = jax.grad(lambda v, s, b: jnp.sum(learned_step(v, s, b, spec) * up.astype(np.float32)),
                 (0, 1, 2) if beta is not None else (0, 1))(*given)

  group_of = np.zeros(ROWS, int) if spec.tensor else np.arange(ROWS) // group
  each = lambda a: np.broadcast_to(a[group_of], v.shape)
  u = v / each(step) - (0 if beta is None else each(beta) / each(step))
  n, p = spec.low, spec.high
  inside = (n < u) & (u < p)
  assert inside.any() and not inside.all()
  slope = np.where(inside, np.round(u) - u, np.clip(u, n, p))
  members = [np.flatnonzero(group_of == k) for k in range(shape[0])]
  total = lambda a: np.array([
      a[m].sum(axis=None if spec.tensor else 0).reshape(shape[1]) for m in members])
  sharing = np.array([[len(m) * (COLUMNS if spec.tensor else 1)] for m in members])
  want = [np.where(inside, up, 0), total(up * slope) / np.sqrt(sharing * p),
          total(np.where(inside, 0, up)) / np.sqrt(sharing * p)]
  for a, b in zip(got, want):                          # float32 sums of twelve terms of order 1
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(('text', 'group'), [('w4a16', 12), ('w3a16-g8', 8), ('w4a16-tensor', 12)])
def test_lsq_starts_at_twice_the_mean_magnitude_over_the_root_of_the_greatest_code(text, group):
  w = lsq(dense(ROWS, COLUMNS), text)
  magnitude = np.abs(draw(0, ROWS, COLUMNS))
  parts = [magnitude[k:k + group] for k in range(0, ROWS, group)]
  tensor = w.spec.tensor
  want = np.array([2 * np.mean(p, axis=None if tensor else 0).reshape(-1) for p in parts])
  np.testing.assert_allclose(w.scale, want / np.sqrt(w.spec.high), rtol=1e-6)
  assert w.offset is None


def test_lsq_plus_starts_at_three_sigma_or_where_the_squared_error_is_least():
  w = dense(64, COLUMNS)
  value = draw(0, 64, COLUMNS)
  mean, sigma = value.mean(0), value.std(0)
  want = np.maximum(abs(mean - 3 * sigma), abs(mean + 3 * sigma))[None] / 8
  np.testing.assert_allclose(lsq_plus(w, 'w4a16').scale, want, rtol=1e-5)
  error = lambda q: jnp.sum((q.unbox() - w.value) ** 2, axis=0)
  ours, rounded = error(lsq_plus(w, 'w2a16')), error(rtn(w, 'w2a16'))
  assert bool(jnp.all(ours <= rounded * (1 + 1e-6))) and float(jnp.sum(ours)) < .9 * float(
      jnp.sum(rounded))


@pytest.mark.parametrize('method', [lsq, lsq_plus])
@pytest.mark.parametrize(('text', 'dims'), [
    ('w4a16-g5', 'nio'), ('w8a8', 'io'), ('w3a16-tensor', 'eio'), ('w2a16-g8', 'oi')])
def test_what_lsq_trains_is_what_the_integers_compute(method, text, dims):
  if method is lsq and not parse_spec(text).symmetric:
    text += '-sym'
  w = method(dense(*({'n': 2, 'e': 3, 'i': ROWS, 'o': 5}[d] for d in dims), dims=dims), text)
  nudge = lambda x, seed: None if x is None else x * jnp.asarray(
      1 + .2 * draw(seed, *x.shape), jnp.float32)
  w = dataclasses.replace(w, scale=nudge(w.scale, 1), offset=nudge(w.offset, 2))
  w = dataclasses.replace(w, scale=w.scale.at[(0,) * w.scale.ndim].set(-1.))   # training may do so
  stored = rtn(w, text)
  assert isinstance(stored, Quantized) and stored.spec == parse_spec(text)
  np.testing.assert_array_equal(jax.jit(lambda w: w.unbox())(w), stored.unbox())
  assert bool(jnp.all(jnp.isfinite(stored.unbox())))


def test_the_gradient_of_pact_is_the_papers_in_float64():
  """PACT, equation 3, of both signs."""
  x, up, alpha = draw(0, 4, 7), draw(1, 4, 7), 1.25
  run = lambda x, level: jnp.sum(clipped(x, (level / 127).reshape(1, 1)) * up.astype(np.float32))
  value, (dx, dalpha) = jax.value_and_grad(run, (0, 1))(
      jnp.asarray(x, jnp.float32), jnp.float32(alpha))
  beyond = np.abs(x) >= alpha
  assert beyond.any() and not beyond.all()
  np.testing.assert_allclose(dx, np.where(beyond, 0, up), atol=1e-6)
  np.testing.assert_allclose(dalpha, np.sum(np.where(beyond, np.sign(x) * up, 0)), atol=1e-5)
  rounded = np.round(np.clip(x, -alpha, alpha) * 127 / alpha) * alpha / 127
  np.testing.assert_allclose(value, np.sum(rounded * up), rtol=1e-5)


def test_within_a_range_that_is_averaged_the_gradient_passes_straight():
  x, up = draw(0, 4, 7), draw(1, 4, 7)
  dx, dstep = jax.grad(lambda x, s: jnp.sum(fixed(x, s) * up.astype(np.float32)), (0, 1))(
      jnp.asarray(x, jnp.float32), jnp.full((4, 1), 1.25 / 127))
  np.testing.assert_allclose(dx, np.where(np.abs(x) >= 1.25, 0, up), atol=1e-6)
  assert not dstep.any()


CONFIG = DecoderConfig(vocabulary=32, width=16, layers=2, heads=2, groups=2, head_width=8,
                       hidden=16, context=8, remat=True)
MODULE = Decoder(CONFIG)
SCHEDULE = dict(steps=30, peak=2e-2)


class Same:
  """The same batch at each step: sequences that count."""
  fingerprint = 'counting'

  def __getitem__(self, step):
    return dict(tokens=((np.arange(16)[:, None] * 2 + np.arange(8)) % 32).astype(np.int32))


@functools.cache
def fresh():
  return jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']


def lean(params, method, **settings):
  return methods.apply(params, (dict(where='layers/.*', method=method, **settings),))


loss = jax.jit(lambda params: next_token(MODULE)(params, Same()[0], None)[0])


@functools.cache
def float_model():
  return train(MODULE, fresh(), Same(), **SCHEDULE)[0]


def kernel(params, name='q'):
  found = {n: w for n, w in tree.named_weights(params).items() if f'/{name}/' in n}
  return next(iter(found.values()))


class Ranged:
  """Batches that are ever larger: the input of one weight, [8 4]."""

  def __getitem__(self, step):
    return dict(x=(draw(step, 8, 4) * (step + 1)).astype(np.float32))


@pytest.mark.parametrize(('mesh', 'accumulate'), [(None, 1), ({'data': 4}, 1), (None, 2)])
def test_a_range_is_the_moving_average_of_what_was_seen(mesh, accumulate):
  """Jacob et al. 2018, section 3.1; on any mesh, and whatever the optimizer of the rest does."""
  w = {'kernel': ema(fake_quantize(dense(4, 4), 'w8a8'), .75)}
  run = lambda params, batch, key: (jnp.sum(params['kernel'].einsum('bd,df->bf', batch['x'])), {})
  got, _ = fit(run, w, Ranged(), averaged(optax.chain(optax.clip_by_global_norm(1e-3),
                                                      optax.adam(1e-3))), steps=4,
               accumulate=accumulate, mesh=mesh and make_mesh(**mesh))
  want = 0.
  for step in range(4):
    x = np.abs(Ranged()[step]['x'].astype(np.float64))
    tops = x.reshape(accumulate, -1).max(axis=1)
    want = tops.mean() if step == 0 else want + .25 * (tops.mean() - want)
  np.testing.assert_allclose(got['kernel'].inputs.range, want, rtol=1e-5)
  assert float(jnp.abs(got['kernel'].base.value - w['kernel'].base.value).max()) > 1e-3


def static(kind):
  """The trained model, its weights in w8a8, its activations in ranges that are learned."""
  params = lean(float_model(), 'fake_quantize', spec='w8a8')
  return lean(params, *{'ema': ('ema',), 'pact': ('pact',)}[kind],
              **{'ema': dict(decay=.9), 'pact': dict(level=10.)}[kind])


@pytest.mark.parametrize('kind', ['ema', pytest.param('pact', marks=pytest.mark.slow)])
def test_static_activations_train_and_are_then_those_of_the_integers(kind):
  params = static(kind)
  trained, _ = train(MODULE, params, Same(), steps=4, peak=1e-3, weight_decay=.1)
  ranges = lambda p: {n: x for n, x in tree.named_arrays(p).items() if '/inputs/' in n}
  assert len(ranges(trained)) == 7
  for name, x in ranges(trained).items():              # each layer its own
    assert x.shape == (2,) and bool(jnp.all(x > 0))
    assert float(jnp.abs(x - ranges(params)[name]).max()) > 0
  stored = lean(trained, 'rtn', spec='w8a8-static')
  w = kernel(stored)
  assert isinstance(w, Quantized) and w.input_scale.shape == (2,)
  np.testing.assert_array_equal(w.unbox(), kernel(trained).unbox())
  run = jax.jit(lambda p: MODULE.apply({'params': p}, Same()[0]['tokens'])[0])
  # A float32 sum and one of integers differ in the last place; a code of the next layer may flip.
  np.testing.assert_allclose(run(stored), run(trained), atol=.02)
  assert float(loss(stored)) < float(loss(float_model())) + .02


def test_calibrating_is_training_the_ranges_alone():
  params = static('ema')
  found, _ = train(MODULE, params, Same(), steps=1, peak=1e-3, trainable='.*/inputs/range')
  for (name, a), b in zip(tree.named_arrays(found).items(), tree.named_arrays(params).values()):
    assert name.endswith('/inputs/range') != bool(jnp.array_equal(a, b))


@pytest.mark.parametrize('text', ['w1.58a8', 'w1a8'])
@pytest.mark.parametrize('dims', ['io', 'nio'])
def test_bitnet_is_the_papers_in_float64(text, dims):
  """arXiv:2402.17764, section 2; arXiv:2310.11453, equations 1 to 9; both straight through."""
  value = draw(0, *(2, ROWS, COLUMNS)[-len(dims):]) + .3
  x, up = draw(1, 5, ROWS), draw(2, 5, COLUMNS)
  w = fake_quantize(Dense(jnp.asarray(value, jnp.float32), dims, (None,) * len(dims)), text)
  of = lambda a: a.mean(axis=(-2, -1), keepdims=True)
  scale = of(abs(value))
  signs = np.where(value > of(value), 1, -1) if text == 'w1a8' else np.clip(
      np.round(value / scale), -1, 1)
  assert len(np.unique(signs)) == (2 if text == 'w1a8' else 3)
  top = abs(x).max(axis=-1, keepdims=True) / 127
  rounded = np.round(x / top) * top
  np.testing.assert_allclose(w.unbox(), signs * scale, rtol=1e-6)
  one = w if dims == 'io' else jax.tree.map(lambda a: a[1], w).remove_axis(0, {})
  alone, value = (signs * scale).reshape(-1, ROWS, COLUMNS)[-1], value.reshape(
      -1, ROWS, COLUMNS)[-1]
  y, pull = jax.vjp(lambda w, x: w.einsum('bi,io->bo', x), one, jnp.asarray(x, jnp.float32))
  dw, dx = pull(jnp.asarray(up, jnp.float32))
  for got, want in ((y, rounded @ alone), (dw.base.value, rounded.T @ up), (dx, up @ alone.T)):
    np.testing.assert_allclose(got, want, atol=2e-5)   # float32 sums of twelve terms of order 1
  stored = rtn(one, text)
  assert stored.codes().dtype == jnp.uint8 and stored.values.size < value.size
  np.testing.assert_allclose(stored.einsum('bi,io->bo', jnp.asarray(x, jnp.float32)), y, atol=2e-5)


@pytest.mark.parametrize('text', ['w1.58a8', 'w1a8'])
def test_bitnet_from_scratch_beats_rounding_what_was_trained_in_float(text):
  """arXiv:2402.17764 and 2310.11453: the weights are of two or three values from the start."""
  trained, _ = train(MODULE, lean(fresh(), 'fake_quantize', spec=text), Same(), **SCHEDULE)
  stored = lean(trained, 'rtn', spec=text)
  np.testing.assert_array_equal(kernel(stored).unbox(), kernel(trained).unbox())
  after = float(loss(lean(float_model(), 'rtn', spec=text)))
  assert float(loss(stored)) < .5 * after and after > 2 * float(loss(float_model()))


@pytest.mark.parametrize(('method', 'text'), [
    ('fake_quantize', 'w2a16'), ('lsq', 'w2a16-sym'),
    pytest.param('lsq_plus', 'w2a16', marks=pytest.mark.slow)])
def test_training_through_two_bits_with_the_float_teacher_beats_rounding(method, text):
  """LLM-QAT, arXiv:2305.17888: the float model's distribution is the target."""
  teacher = float_model()
  trained, _ = train(MODULE, lean(teacher, method, spec=text), Same(), steps=20, peak=5e-3,
                     teacher=(MODULE, teacher), losses=soft_and_hard(1., 1.))
  stored = lean(trained, 'rtn', spec=text)
  np.testing.assert_array_equal(kernel(stored).unbox(), kernel(trained).unbox())
  assert float(loss(stored)) < .5 * float(loss(lean(teacher, 'rtn', spec=text)))


@pytest.mark.parametrize(('make', 'match'), [
    (lambda w: lsq(w, 'w2a16'), 'lsq_plus'), (lambda w: lsq(w, 'nf4'), 'integers'),
    (lambda w: lsq(rtn(w, 'w4a16'), 'w4a16'), 'Quantized'),
    (lambda w: lsq(w, 'w8a8-static'), 'ema'),
    (lambda w: fake_quantize(w, 'w8a8-static'), 'pact or ema'),
    (lambda w: rtn(w, 'w8a8-static'), 'range'), (lambda w: pact(w, 6.), 'fake_quantize'),
    (lambda w: pact(fake_quantize(w, 'w4a8'), 6.), 'w4a8'),
    (lambda w: pact(fake_quantize(w, 'w8a8'), 0.), 'level'),
    (lambda w: ema(fake_quantize(w, 'w8a8'), 1.), 'decay'),
    (lambda w: ema(pact(fake_quantize(w, 'w8a8'), 6.), .9), 'once')])
def test_what_cannot_be_trained_so_is_refused_in_one_line(make, match):
  with pytest.raises(InputError, match=match) as error:
    make(dense(ROWS, COLUMNS))
  assert '\n' not in str(error.value)


def test_a_range_that_nothing_was_seen_of_is_loud():
  w = rtn(ema(fake_quantize(dense(ROWS, COLUMNS), 'w8a8'), .9), 'w8a8-static')
  assert bool(jnp.all(jnp.isnan(w.einsum('bd,df->bf', jnp.ones((2, ROWS))))))


def test_weight_decay_spares_learned_steps():
  params = {'kernel': lsq(dense(ROWS, COLUMNS), 'w4a16')}
  tx = adamw(steps=1, peak=1., weight_decay=.5)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zero, tx.init(params), params)
  assert not updates['kernel'].scale.any() and updates['kernel'].base.value.any()
