"""The loop: what trains, what stays, what a step is a function of."""
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lean_jax import methods, tree
from lean_jax.distillation.losses import distillation
from lean_jax.errors import InputError, NonFiniteError, Preempted
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.objectives.language_modeling import next_token
from lean_jax.training import mesh as meshes
from lean_jax.training.checkpoint import Checkpoints
from lean_jax.training.loop import fit, watch
from lean_jax.training.metrics import Metrics
from lean_jax.training.optimizer import adamw
from lean_jax.training.recipe import train

CONFIG = DecoderConfig(vocabulary=32, width=16, layers=2, heads=2, groups=1, head_width=8,
                       hidden=32, context=16)
MODULE = Decoder(CONFIG)
LOSS = next_token(MODULE)
TX = adamw(steps=20, peak=1e-2, warmup=2)


class Batches:
  """A batch is a function of its step."""
  fingerprint = 'test'

  def __init__(self, rows=8, vocabulary=32):
    self.size, self.vocabulary = rows, vocabulary

  def rows(self, step):
    return range(step * self.size, (step + 1) * self.size)

  def __getitem__(self, step):
    tokens = np.random.default_rng(step).integers(0, self.vocabulary, (self.size, 16))
    return dict(tokens=tokens.astype(np.int32))


@functools.cache
def initial():
  return jax.jit(MODULE.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']


def equal(a, b):
  return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))


def test_only_the_trainable_arrays_change_and_only_they_have_optimizer_state():
  params = methods.apply(initial(), (
      dict(where='layers/.*', method='rtn', spec='w4a16-g8'),
      dict(where='layers/.*', method='lora', rank=2, alpha=4)), jax.random.key(1))
  before = jax.tree.map(np.asarray, params)
  states = []
  tx = optax.GradientTransformation(
      lambda p: states.append(tree.named_arrays(p)) or TX.init(p), TX.update)
  after, _ = fit(LOSS, params, Batches(), tx, steps=4, trainable='.*/(a|b)')
  changed = {n for n, x in tree.named_arrays(after).items()
             if not np.array_equal(x, tree.named_arrays(before)[n])}
  assert changed == {n for n in tree.named_arrays(params) if re.fullmatch('.*/(a|b)', n)}
  assert all(set(s) == changed for s in states)
  assert equal(params, before)                        # the caller's arrays are not donated


@pytest.mark.parametrize('shape', [{}, dict(fsdp=2, tensor=2)])
def test_a_step_is_compiled_once(shape):
  traces = []
  def loss(params, batch, key):
    traces.append(1)
    return LOSS(params, batch, key)
  fit(loss, initial(), Batches(), TX, steps=4, mesh=meshes.make_mesh(**shape))
  assert len(traces) == 1


def test_integers_cannot_be_trained():
  params = methods.apply(initial(), (dict(where='layers/.*', method='rtn', spec='w4a16'),))
  with pytest.raises(InputError, match='adapter'):
    fit(LOSS, params, Batches(), TX, steps=1)


def test_accumulated_microbatches_are_one_batch():
  whole, _ = fit(LOSS, initial(), Batches(), optax.sgd(.1), steps=1)
  parts, _ = fit(LOSS, initial(), Batches(), optax.sgd(.1), steps=1, accumulate=4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


@pytest.mark.parametrize(('kind', 'shape'), [
    pytest.param(kind, shape, marks=[] if kind == 'dense' or len(shape) == 3 else [
        pytest.mark.slow])
    for kind in ('dense', 'qlora', 'qat')
    for shape in (dict(data=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2))])
def test_sharded_is_unsharded(shape, kind):
  steps = dict(dense=(), qat=(dict(where='layers/.*', method='fake_quantize', spec='w8a8'),),
               qlora=(dict(where='layers/.*', method='rtn', spec='w4a16-g8'),
                      dict(where='layers/.*', method='lora', rank=2, alpha=4)))[kind]
  params = methods.apply(initial(), steps, jax.random.key(1))
  trainable = '.*/(a|b)' if kind == 'qlora' else '.*'
  run = lambda mesh: fit(LOSS, params, Batches(), optax.sgd(.1), steps=2, trainable=trainable,
                         mesh=mesh)[0]
  one, many = run(None), run(meshes.make_mesh(**shape))
  # A rounding in QAT may fall to the other side where sums are in another order: a step of 8 bits.
  tolerance = 5e-3 if kind == 'qat' else 1e-5
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance), one, many)


def test_weights_and_their_moments_are_really_sharded():
  mesh = meshes.make_mesh(fsdp=4, tensor=2)
  where = meshes.shardings(initial(), mesh)
  assert where['layers']['mlp']['up']['kernel'].value.spec == PartitionSpec(None, 'fsdp', 'tensor')
  opt = jax.eval_shape(TX.init, initial())
  specs = [s.spec for s in jax.tree.leaves(meshes.of_optimizer(opt, initial(), where, mesh))]
  wanted = PartitionSpec(None, 'fsdp', 'tensor')
  assert sum(s == wanted for s in specs) == 2 * 5      # of q k v gate up, mu and nu


def test_the_blocks_constraints_are_not_dropped():
  mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
  tokens = jnp.zeros((8, 16), jnp.int32)
  lower = lambda: jax.jit(lambda p, t: MODULE.apply({'params': p}, t)[0]).lower(initial(), tokens)
  with meshes.on(mesh):
    assert lower().as_text().count('sharding_constraint') >= 4
  assert lower().as_text().count('sharding_constraint') == 0


def test_a_mesh_without_its_devices_is_refused():
  with pytest.raises(InputError, match='devices'):
    meshes.make_mesh(data=64)
  with pytest.raises(InputError, match='divide'):
    fit(LOSS, initial(), Batches(6), TX, steps=1, mesh=meshes.make_mesh(data=4))


def test_resumed_is_uninterrupted(tmp_path):
  straight, _ = fit(LOSS, initial(), Batches(), TX, steps=6)
  with Checkpoints(tmp_path, every=2) as c:
    fit(LOSS, initial(), Batches(), TX, steps=4, checkpoints=c)
  seen = []
  with Checkpoints(tmp_path, every=2) as c:
    resumed, _ = fit(LOSS, initial(), Batches(), TX, steps=6, checkpoints=c,
                     hooks=[lambda step, _: seen.append(step)])
  assert seen == [5, 6] and equal(straight, resumed)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
  with Checkpoints(tmp_path, every=2) as c:
    fit(LOSS, initial(), Batches(), TX, steps=2, checkpoints=c)
  with Checkpoints(tmp_path, every=2) as c, pytest.raises(InputError, match='another seed'):
    fit(LOSS, initial(), Batches(), TX, steps=4, checkpoints=c, seed=1)
  with Checkpoints(tmp_path, every=2) as c, pytest.raises(InputError, match='another settings'):
    fit(LOSS, initial(), Batches(), TX, steps=4, checkpoints=c, settings=dict(peak=1.))


def test_being_stopped_saves(tmp_path):
  calls = iter([False, True])
  with Checkpoints(tmp_path, every=100) as c, pytest.raises(Preempted, match='saved'):
    fit(LOSS, initial(), Batches(), TX, steps=6, checkpoints=c, stop=lambda: next(calls))
  with Checkpoints(tmp_path, every=100) as c:
    assert c.latest() == 2


def test_a_nan_stops_with_its_step_and_batch_and_nothing_is_saved(tmp_path):
  def loss(params, batch, key):
    value, metrics = LOSS(params, batch, key)
    poison = jnp.where(batch['tokens'][0, 0] == int(Batches()[3]['tokens'][0, 0]), jnp.nan, 1.)
    return value * poison, metrics
  with Checkpoints(tmp_path, every=1) as c:
    with pytest.raises(NonFiniteError, match=r'step 4.*batch 3 \(rows \[24, 25'):
      fit(loss, initial(), Batches(), TX, steps=20, checkpoints=c)
    c.wait()
    assert c.latest() == 3


def test_an_infinite_gradient_is_found_without_checkpoints():
  loss = lambda params, batch, key: (
      jnp.sqrt(jnp.sum(params['norm']['scale'] * 0)) * 1., {})
  with pytest.raises(NonFiniteError, match='step 1'):
    fit(loss, initial(), Batches(), optax.sgd(.1), steps=1)


def test_a_teacher_is_an_argument_of_the_step_and_gets_no_gradient():
  loss = distillation(MODULE, MODULE, temperature=2., soft_weight=.5)
  teacher = jax.tree.map(lambda x: x + .1, initial())
  grad = jax.grad(lambda t: loss(initial(), Batches()[0], None, teacher_params=t)[0])(teacher)
  assert all(not x.any() for x in jax.tree.leaves(grad))
  out, _ = fit(loss, initial(), Batches(), TX, steps=2, frozen=dict(teacher_params=teacher))
  assert not equal(out, initial())


def test_a_teacher_with_another_vocabulary_is_refused():
  other = Decoder(DecoderConfig(**{**vars(CONFIG), 'vocabulary': 48}))
  with pytest.raises(InputError, match='48.*32'):
    train(MODULE, initial(), Batches(), steps=1, peak=1e-3, teacher=(other, None))


def test_a_resumed_run_writes_no_step_twice(tmp_path):
  write = lambda first, last: [hook(step, dict(loss=step)) for step in range(first, last)]
  with Metrics(tmp_path, every=1) as hook:
    write(1, 6)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "lo')                                       # killed while writing
  with Metrics(tmp_path, every=1) as hook:
    write(4, 8)
  steps = [json.loads(x)['step'] for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert steps == [1, 2, 3, 4, 5, 6, 7]
  assert list(tmp_path.glob('events.*'))


def test_a_run_that_passes_over_a_damaged_checkpoint_writes_no_step_twice(tmp_path):
  at = [0]
  run = lambda **more: train(MODULE, initial(), Batches(), steps=4, peak=1e-3, folder=tmp_path,
                             save_every=1, log_every=1, **more)
  with pytest.raises(Preempted):
    run(hooks=(lambda step, _: at.__setitem__(0, step),), stop=lambda: at[0] == 2)
  files = (tmp_path / 'checkpoints' / '3' / 'params' / 'd').iterdir()
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-20])
  with pytest.warns(UserWarning, match='went back to step 2'):
    run()
  steps = [json.loads(x)['step'] for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert steps == [1, 2, 3, 4]


def test_the_optimizer_spares_the_norms_and_names_bad_settings():
  tx = adamw(steps=10, peak=1., weight_decay=.5)
  params = {'norm': {'scale': jnp.ones(3)}, 'up': {'kernel': jnp.ones(3)}}
  state = tx.init(params)
  for _ in range(3):
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
  assert float(jnp.abs(updates['norm']['scale']).max()) == 0
  assert float(jnp.abs(updates['up']['kernel']).max()) > 0
  for bad in (dict(steps=0, peak=1.), dict(steps=1, peak=0.), dict(steps=1, peak=1., decay='x')):
    with pytest.raises(InputError, match='expected|there are'):
      adamw(**bad)


def spiky(params, batch, key, step):
  """A loss that is not finite at step 22 and 30 times itself at step 25."""
  value, metrics = LOSS(params, batch, key)
  return value * jnp.where(step == 22, jnp.nan, jnp.where(step == 25, 30., 1.)), metrics


SKIPS = dict(watched=watch('skip', 4.), steps=28)


@pytest.fixture(scope='module')
def skipped():
  said, seen = [], []
  out, _ = fit(spiky, initial(), Batches(), TX, warn=said.append, **SKIPS,
               hooks=[lambda step, m: seen.append(int(m['skipped']))])
  return out, said, seen


def test_bad_steps_are_skipped_and_named(skipped):
  out, said, seen = skipped
  assert [k for k, s in enumerate(seen) if s] == [22, 25]
  assert len(said) == 2
  assert 'step 23: the loss or its gradient is not finite, on batch 22 (rows [176, 177' in said[0]
  assert 'over 4.0 times the median' in said[1] and 'on batch 25 (rows [200,' in said[1]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))


def test_skipping_is_the_same_on_resume(skipped, tmp_path):
  with Checkpoints(tmp_path, every=12) as c:           # between the losses that a spike is held to
    fit(spiky, initial(), Batches(), TX, checkpoints=c, warn=lambda _: None,
        **SKIPS | dict(steps=24))
  seen = []
  with Checkpoints(tmp_path, every=12) as c:
    resumed, _ = fit(spiky, initial(), Batches(), TX, checkpoints=c, warn=seen.append, **SKIPS)
  assert len(seen) == 1 and 'step 26' in seen[0]
  assert equal(resumed, skipped[0])


def test_a_spike_stops_with_its_batch():
  with pytest.raises(NonFiniteError, match=r'step 26: .* 4.0 times the median.*on batch 25'):
    fit(lambda params, batch, key, step: spiky(params, batch, key, jnp.where(step == 22, 0, step)),
        initial(), Batches(), TX, steps=28, watched=watch(spike=4.))


def test_skipping_everything_stops():
  loss = lambda params, batch, key: (LOSS(params, batch, key)[0] * jnp.nan, {})
  with pytest.raises(NonFiniteError, match='steps 1 to 20 were all skipped'):
    fit(loss, initial(), Batches(), TX, steps=30, watched=watch('skip'), warn=lambda _: None)


def test_what_is_watched_is_named_if_it_cannot_be():
  with pytest.raises(InputError, match="expected 'stop' or 'skip'"):
    watch('ignore')
  with pytest.raises(InputError, match='spike 1.0; expected'):
    watch(spike=1.)
