"""Calibration over real layers of every family: what is seen, what is moved, what goes on."""
import dataclasses
import gc
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import methods, tree
from lean_jax.calibration import blocks, driver, statistics
from lean_jax.calibration.driver import calibrated
from lean_jax.calibration.shared import inputs
from lean_jax.data.windows import Windows
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.segments import converted, unstacked
from lean_jax.quantization.gptq import gptq
from lean_jax.quantization.spec import parse_spec
from lean_jax.training.mesh import make_mesh, shardings
from lean_jax.weights import Quantized
from tests.models import methods_matrix as matrix

MATRICES = matrix.MATRICES
# Of each way to normalise, to branch and to mix one; the others on demand.
FEW = ('bert', 'mixtral', 'phi')
rule = lambda name, spec, **settings: methods.bound(name, dict(settings, spec=parse_spec(spec)))


def random_scales(matrices, stats):
  """What AWQ's and SmoothQuant's scales might be."""
  size = matrices[0].shape[-2]
  return jnp.exp(jax.random.normal(jax.random.key(size), (size,)) * .5)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in matrix.CONFIGS])
def test_scales_move_and_no_output_changes(name):
  config, params = matrix.model(name)
  batch = matrix.batch(config)
  still = methods.Bound('none', lambda w: w, random_scales, None, True, frozenset())
  out, rows = calibrated(config, params, [(MATRICES, still)], [batch])
  names = {n for n in tree.named_weights(params) if 'layers/' in n}
  assert len({(r['stack'], r['layer'], r['name']) for r in rows}) >= len(names)
  before, after = matrix.outputs(name), matrix.computed(config.module, out, batch)
  np.testing.assert_allclose(after, before, atol=2e-4 * np.abs(before).max())
  moved = [n for n in names if not n.endswith('table')
           and jax.tree.leaves(tree.named_weights(out)[n])[0].shape
           and not np.array_equal(jax.tree.leaves(tree.named_weights(out)[n])[0],
                                  jax.tree.leaves(tree.named_weights(params)[n])[0])]
  assert moved                                         # and yet weights are other ones


@pytest.mark.parametrize(('name', 'wanted'), [
    ('llama', {'q': 'mixer_norm', 'k': 'mixer_norm', 'v': 'mixer_norm', 'o': None,
               'gate': 'feed_forward_norm', 'up': 'feed_forward_norm', 'down': 'mlp/up'}),
    ('gpt2', {'q': 'mixer_norm', 'k': 'mixer_norm', 'v': 'mixer_norm', 'o': 'attention/v',
              'up': 'feed_forward_norm', 'down': None}),
    ('phi', {'q': 'mixer_norm', 'k': 'mixer_norm', 'v': 'mixer_norm', 'o': 'attention/v',
             'up': 'mixer_norm', 'down': None}),
    ('bert', {'q': None, 'k': None, 'v': None, 'o': 'attention/v', 'up': None, 'down': None})])
def test_what_makes_an_input_takes_its_scale(name, wanted):
  config, params = matrix.model(name)
  site = blocks.sites(config)[0]
  found = inputs(config, site.kind, blocks.layer(params, site))
  assert {r.split('/')[-1]: s.norm or s.writer for s in found for r in s.readers} == wanted


def test_gptq_sees_what_the_quantized_layers_before_give():
  config, params = matrix.model('llama')
  batch, spec = matrix.batch(config), 'w3a16-g8'
  out, rows = calibrated(config, params, [(MATRICES, rule('gptq', spec))], [batch])
  # By hand: layer by layer, the module's own inputs, through layers as they are by then.
  x, frame, _ = config.module.apply({'params': params}, batch['tokens'], method='begin')
  for k, (old, new) in enumerate(zip(unstacked(config, params['layers']),
                                     unstacked(config, out['layers']))):
    site = blocks.sites(config)[k]
    norm = lambda x, g: x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.epsilon) * g
    seen = norm(np.asarray(x, np.float64), np.asarray(old['mixer_norm']['scale']))
    wanted = gptq(old['attention']['q']['kernel'], spec,
                  statistics.of_matrix(jnp.asarray(seen.reshape(-1, config.width), jnp.float32)))
    got = new['attention']['q']['kernel']
    assert np.mean(np.asarray(got.codes()) == np.asarray(wanted.codes())) > .98
    x = blocks.through(config, site.kind, new, x, blocks.place(config, site), frame)
  assert {r['layer'] for r in rows} == set(range(config.layers))
  error = next(r['error'] for r in rows if r['name'] == 'attention/q/kernel' and r['layer'] == 1)
  assert 0 < error < .5


@pytest.mark.slow
def test_written_out_layers_and_several_batches_give_the_same():
  config, params = matrix.model('llama')
  batch = matrix.batch(config)
  rules = [(MATRICES, rule('gptq', 'w4a16-g8'))]
  whole, _ = calibrated(config, params, rules, [batch])
  halves = [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]
  other, flat = converted(config, params, False)
  out, _ = calibrated(other, flat, rules, halves)
  _, out = converted(other, out, True)
  for name, w in tree.named_weights(whole).items():
    if isinstance(w, Quantized):
      same = np.asarray(w.codes()) == np.asarray(tree.named_weights(out)[name].codes())
      assert same.mean() > .98, name                   # sums in another order


@pytest.mark.parametrize('method', [
    'awq', pytest.param('gptq', marks=pytest.mark.slow), 'smoothquant'])
def test_experts_are_calibrated_each_on_its_own(method):
  config, params = matrix.model('mixtral')
  scheme = 'w8a8' if method == 'smoothquant' else 'w4a16-g8'
  batch = matrix.batch(config)
  out, rows = calibrated(config, params, [(MATRICES, rule(method, scheme))], [batch])
  kept = [n for n, w in tree.named_weights(out).items()
          if 'layers/' in n and not isinstance(getattr(w, 'base', w), Quantized)]
  assert not kept                                      # nothing silently in float
  notes = [r['note'] for r in rows if 'experts' in r['name']]
  assert notes and all('expert' in note for note in notes)
  before, after = matrix.outputs('mixtral'), matrix.computed(config.module, out, batch)
  assert np.sqrt(np.mean((after - before) ** 2)) < .5 * np.sqrt(np.mean(before ** 2))


def test_weights_in_no_layer_are_calibrated_on_what_they_see():
  config, params = matrix.model('llama')
  rules = [('head/kernel', rule('gptq', 'w4a16-g8')), ('embed/table', rule('gptq', 'w4a16-g8'))]
  head = 'head/kernel' in tree.named_weights(params)
  out, rows = calibrated(config, params, rules if head else rules[1:], [matrix.batch(config)])
  notes = {r['name']: r['note'] for r in rows}
  assert isinstance(tree.named_weights(out)['embed/table'], Quantized)
  if head:
    assert notes == {'head/kernel': '', 'embed/table': driver.UNSEEN}


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
  config, params = matrix.model('llama')
  batches = [matrix.batch(config)]
  rules = [(MATRICES, rule('rtn', 'w4a16-g8'))]
  whole, wanted = calibrated(config, params, rules, batches)
  write, done = driver.Kept.write, []

  def dies(self, prefix, number, *found):
    write(self, prefix, number, *found)
    raise KeyboardInterrupt
  monkeypatch.setattr(driver.Kept, 'write', dies)
  with pytest.raises(KeyboardInterrupt):
    calibrated(config, params, rules, batches, folder=tmp_path / 'kept')
  monkeypatch.setattr(driver.Kept, 'write', lambda self, prefix, number, *found: (
      done.append(number), write(self, prefix, number, *found)))
  out, rows = calibrated(config, params, rules, batches, folder=tmp_path / 'kept')
  assert done == list(range(1, config.layers)) and rows == wanted
  jax.tree.map(np.testing.assert_array_equal, out, whole)
  with pytest.raises(InputError, match='another quantization; remove it'):
    calibrated(config, params, [(MATRICES, rule('gptq', 'w3a16-g8'))], batches,
               folder=tmp_path / 'kept')


@pytest.mark.parametrize('method', ['gptq', pytest.param('awq', marks=pytest.mark.slow)])
def test_one_layer_is_held_above_the_model_and_its_copy(method):
  config = DecoderConfig(vocabulary=100, width=64, layers=16, heads=2, groups=2, head_width=32,
                         hidden=192, context=32)
  params = jax.jit(config.module.init)(
      jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  batch = dict(tokens=np.random.default_rng(0).integers(0, 100, (1, 16)).astype(np.int32))
  live = lambda: sum(a.nbytes for a in jax.live_arrays())
  gc.collect()
  start, most, over = live(), [], threading.Event()

  def watch():
    while not over.wait(.0005):
      most.append(live())
  thread = threading.Thread(target=watch)
  thread.start()
  try:
    out, _ = calibrated(config, params, [(MATRICES, rule(method, 'w4a16-g32'))], [batch])
  finally:
    over.set()
    thread.join()
  layers = lambda params: tree.nbytes(params['layers'])
  # Its copy stands twice for the moment in which its layers are stacked.
  assert len(most) > 20
  assert max(most) - start < 2 * layers(out) + 2 * layers(params) / config.layers


def test_what_is_not_finite_is_told_with_its_layer():
  config, params = matrix.model('llama')
  batch = matrix.batch(config)
  put = lambda path, value: jax.tree_util.tree_map_with_path(
      lambda p, x: x.at[1, 0].set(value) if tree.name(p).startswith(path) else x, params)
  rules = [(MATRICES, rule('gptq', 'w4a16-g8'))]
  with pytest.raises(InputError, match=r'attention/q/kernel of layer 1 has a NaN'):
    calibrated(config, put('layers/attention/q/kernel', jnp.nan), rules, [batch])
  with pytest.raises(InputError, match=r'inputs of attention/. ?.*of layer 1 have a NaN'):
    calibrated(config, put('layers/mixer_norm/scale', jnp.inf), rules, [batch])


def test_a_static_range_is_what_inputs_had_and_is_used():
  config, params = matrix.model('llama')
  batch = matrix.batch(config)
  out, _ = calibrated(config, params, [(MATRICES, rule('rtn', 'w8a8-static'))], [batch])
  w = out['layers']['attention']['q']['kernel']
  assert w.input_scale.shape == (config.layers,) and w.spec.static
  before, after = matrix.outputs('llama'), matrix.computed(config.module, out, batch)
  assert np.sqrt(np.mean((after - before) ** 2)) < .15 * np.sqrt(np.mean(before ** 2))
  tiny = dataclasses.replace(w, input_scale=w.input_scale * 1e-3)     # it is really rounded to it
  other = dict(out, layers=dict(out['layers'], attention=dict(
      out['layers']['attention'], q=dict(out['layers']['attention']['q'], kernel=tiny))))
  assert not np.allclose(matrix.computed(config.module, other, batch), after, atol=1e-3)


def test_statistics_are_sums_over_real_tokens():
  x = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
  keep = np.arange(12) % 3 > 0
  got = statistics.of_matrix(jnp.asarray(x), jnp.asarray(keep))
  real = x[keep].astype(np.float64)
  assert float(got.rows) == len(real)
  np.testing.assert_allclose(got.second, real.T @ real, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got.size, np.abs(real).sum(0), rtol=1e-5)
  np.testing.assert_allclose(got.top, np.abs(real).max(0), rtol=1e-6)
  assert float(got.histogram.sum()) == real.size
  both = got.add(got)
  np.testing.assert_allclose(both.second, 2 * np.asarray(got.second))
  np.testing.assert_allclose(both.top, got.top)
  s = np.linspace(.5, 2, 5)
  half = statistics.of_matrix(jnp.asarray(x / s), jnp.asarray(keep))
  np.testing.assert_allclose(got.divided(jnp.asarray(s)).second, half.second, rtol=1e-4, atol=1e-5)
  sizes = np.array([3, 0, 9])
  groups = statistics.of_groups(jnp.asarray(x), jnp.asarray(sizes))
  for k, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes)):
    part = x[start:start + size]
    np.testing.assert_allclose(groups.second[k], part.T @ part, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(groups.top[k], np.abs(part).max(0, initial=0), rtol=1e-6)
    assert float(groups.rows[k]) == size and bool(groups.finite[k])
  x[1, 2] = np.nan
  assert not bool(statistics.of_matrix(jnp.asarray(x)).finite)
  assert not bool(statistics.of_groups(jnp.asarray(x), jnp.asarray(sizes)).finite[0])


def test_lean_quantize_says_what_it_cannot_do(tiny_model, tmp_path):
  quantize = lambda *given, **more: lean.quantize(tiny_model, *given, **more)
  text = tmp_path / 'text.txt'
  text.write_text('the quick brown fox ' * 4)
  for given, more, says in [
      (('w4a16-g8', 'gptq'), {}, 'looks at the inputs of weights; give calibration text'),
      (('w4a16-g8', 'gptqq'), {}, 'no method .gptqq.; there are'),
      (('w4a16-g8', 'lora'), {}, 'takes'),
      (('w4a16-g8', 'gptq'), dict(calibration=text, window=64), 'tokens, one window needs 64'),
      (('w4a16-g8', 'gptq'), dict(calibration=text, samples=0, window=16), '0 samples'),
      (('w4a16-g8', 'gptq'), dict(calibration=text, window=16, damp=1), 'damping'),
      (('w4a16-g8',), dict(folder=tmp_path), 'give calibration text, or no folder'),
      (('w4a16-g64',), {}, r'layers/attention/\w/kernel: groups of 64 inputs')]:
    with pytest.raises(InputError, match=says) as error:
      quantize(*given, **more)
    assert '\n' not in str(error.value)
  once = quantize('w4a16-g8')
  with pytest.raises(InputError, match='layers/attention/k/kernel: a Quantized weight cannot be'):
    lean.quantize(once, 'w4a16-g8')


@pytest.mark.parametrize(('scheme', 'method'), [
    ('w8a8', 'smoothquant'), pytest.param('w4a16-g8', 'gptq', marks=pytest.mark.slow)])
def test_sharded_is_unsharded(tiny_model, scheme, method):
  mesh = make_mesh(fsdp=2, tensor=2)
  spread = dataclasses.replace(tiny_model, params=jax.device_put(
      tiny_model.params, shardings(tiny_model.params, mesh)))
  tokens = np.random.default_rng(0).integers(0, 200, (8, 16)).astype(np.uint16)
  windows = Windows(tokens, tokens.size, tokens.size, 1, 'random')
  one, many = (lean.quantize(m, scheme, method, calibration=windows).params['layers']
               for m in (tiny_model, spread))
  for name, w in tree.named_weights(one).items():
    other = tree.named_weights(many)[name]
    w, other = (getattr(v, 'base', v) for v in (w, other))             # Rescaled where it had to be
    assert np.mean(np.asarray(w.codes()) == np.asarray(other.codes())) > .98, name
    assert len(other.values.sharding.device_set) == 4
  assert 'tensor' in str(many['mlp']['up']['kernel'].values.sharding.spec)


def test_rules_give_some_weights_another_scheme(tiny_model):
  rows = []
  model = lean.quantize(tiny_model, 'w4a16-g8', 'rtn', clip='mse', report=rows,
                        rules=[('.*/down/.*', 'w8a16'), ('.*/o/.*', None)])
  kinds = {n.split('/')[-2]: str(getattr(w, 'spec', 'float'))
           for n, w in tree.named_weights(model.params).items() if 'layers' in n}
  assert kinds == dict(q='w4a16-g8', k='w4a16-g8', v='w4a16-g8', o='float', gate='w4a16-g8',
                       up='w4a16-g8', down='w8a16')
  assert {r['name'].split('/')[-2] for r in rows} == set(kinds) - {'o'}
  assert all(0 < r['error'] < .2 and r['bytes'] for r in rows) and json.dumps(rows)
