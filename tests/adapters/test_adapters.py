"""What every adapter does to a model, and what is each one's own."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.bitfit import BIASES
from lean_jax.adapters.dora import dora
from lean_jax.adapters.dropout import dropping, drops_out, with_keys
from lean_jax.adapters.ia3 import ia3
from lean_jax.adapters.lora import lora
from lean_jax.adapters.pissa import pissa
from lean_jax.adapters.trained import trained
from lean_jax.adapters.vera import vera
from lean_jax.nn.attention import AttentionOptions
from lean_jax.objectives.language_modeling import next_token
from lean_jax.quantization.rtn import rtn
from lean_jax.training.optimizer import adamw
from lean_jax.weights import Adapter, Dense, LowRank, Magnitude, Quantized, bare
from tests.adapters.stirring import stirred

METHODS = dict(lora=dict(rank=2, alpha=4.), dora=dict(rank=2, alpha=4.), vera=dict(rank=4), ia3={})
TOKENS = np.arange(24).reshape(2, 12)
TEXT = 'the quick brown fox jumps over the lazy dog\n' * 60
KEY = jax.random.key(0)


def some(*default):
  """The methods, those that are not `default` on demand."""
  return [pytest.param(m, marks=[] if m in default else [pytest.mark.slow]) for m in METHODS]


def dense(*shape, dims='io'):
  value = jax.random.normal(jax.random.key(5), shape)
  return Dense(value, dims, tuple(f'axis{k}' for k in range(len(shape))))


def base_of(model):
  return jax.tree.map(bare, model.params, is_leaf=tree.is_weight)


def same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('method', some('dora', 'ia3'))
def test_an_adapter_starts_as_nothing_trains_alone_and_merges(tiny_model, method):
  base = lean.quantize(tiny_model, 'w4a16-g16')
  model = lean.attach(base, method, **METHODS[method])
  # DoRA divides by the norms that it multiplies by
  np.testing.assert_allclose(model.logits(TOKENS), base.logits(TOKENS), atol=1e-5)
  same(base_of(model), base.params)
  model = stirred(model, .1)
  want = model.logits(TOKENS)
  assert float(jnp.abs(want - base.logits(TOKENS)).max()) > .01
  merged = lean.merge(model)
  assert all(isinstance(w, Dense | Quantized) for w in tree.named_weights(merged.params).values())
  np.testing.assert_allclose(merged.logits(TOKENS), want, atol=1e-4)
  unrolled = lean.scan_layers(model, False)
  assert isinstance(unrolled.params['layers']['1']['attention']['k']['kernel'], Adapter)
  np.testing.assert_allclose(unrolled.logits(TOKENS), want, atol=1e-4)
  again, errors = lean.requantize(model)
  adapted = [n for n, w in tree.named_weights(model.params).items() if isinstance(w, Adapter)]
  assert sorted(errors) == sorted(adapted) and all(0 < e < .3 for e in errors.values())
  assert tree.nbytes(again.params) == tree.nbytes(base.params)


@pytest.mark.parametrize('method', some('vera'))
def test_training_moves_the_adapter_and_leaves_the_base(tiny_model, tmp_path, method):
  path = tmp_path / 'text.txt'
  path.write_text(TEXT)
  base = lean.quantize(tiny_model, 'w4a16-g16')
  model = lean.attach(base, method, **METHODS[method])
  before = lean.evaluate(model, path, window=32)['perplexity']
  after = lean.train(model, path, steps=8, batch=8, peak=3e-2, window=32)
  assert lean.evaluate(after, path, window=32)['perplexity'] < .97 * before
  same(base_of(after), base.params)
  old, new = (tree.split(m.params, trained(model.params)) for m in (model, after))
  same(old[1], new[1])
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), old[0], new[0])
  assert jax.tree.all(moved)
  lean.save(after, tmp_path / 'saved')
  np.testing.assert_array_equal(lean.load(tmp_path / 'saved').logits(TOKENS), after.logits(TOKENS))
  lean.audit(after, TOKENS)


@pytest.mark.parametrize('base', ['float', 'w4a16-g4'])
def test_a_lookup_is_a_row_of_the_dense_value(base):
  w = dense(10, 8, dims='oi')
  w = w if base == 'float' else rtn(w, base)
  for made in (dora(w, 2, 4., key=KEY), vera(w, 2, 8), ia3(w, 'outputs')):
    made = jax.tree.map(lambda x: x * 1.1 + .1 if x.dtype == jnp.float32 else x, made)
    ids = jnp.asarray([[3, 1], [0, 9]])
    np.testing.assert_allclose(made.take(ids), made.unbox()[ids], atol=1e-5)


def test_ranks_differ_by_rules_and_rank_stabilised_scales_by_the_root(tiny_model):
  model = lean.attach_lora(tiny_model, rank=4, alpha=8., scaling='rank_stabilised',
                           rules=[('.*/down/.*', dict(rank=9))])
  layer = model.params['layers']
  down, up = layer['mlp']['down']['kernel'], layer['mlp']['up']['kernel']
  assert down.a.shape == (2, 48, 9) and up.b.shape == (2, 4, 48)
  assert down.scale == 8 / 3 and up.scale == 4


def test_dropout_zeroes_a_part_of_the_inputs_and_scales_the_rest():
  w = dense(1000, 3)
  w = dataclasses.replace(lora(w, 1, 1., key=KEY, dropout=.25), a=jnp.ones((1000, 1)),
                          b=jnp.ones((1, 3)))
  awake = with_keys({'w': w}, jax.random.key(1))['w']
  x = jnp.eye(1000)
  seen = (awake.einsum('bi,io->bo', x) - w.base.einsum('bi,io->bo', x))[:, 0]
  np.testing.assert_allclose(np.unique(np.round(seen, 4)), [0, np.round(4 / 3, 4)])
  # 1000 draws: a deviation of .014
  assert abs(float((seen == 0).mean()) - .25) < .06
  np.testing.assert_array_equal(awake.unbox(), w.unbox())
  experts = with_keys({'w': lora(dense(4, 6, 3, dims='eio'), 1, 1., key=KEY, dropout=.5)}, KEY)['w']
  experts = dataclasses.replace(experts, b=experts.b + 1)
  rows = jax.random.normal(KEY, (4, 6))
  kept = experts._kept(rows)
  bare_lora = dataclasses.replace(experts, keys=None)
  sizes = jnp.asarray([1, 0, 2, 1])
  want = bare_lora.grouped(kept, sizes) + experts.base.grouped(rows - kept, sizes)
  np.testing.assert_allclose(experts.grouped(rows, sizes), want, atol=1e-4)


def dropping_model(tiny_model, remat):
  config = dataclasses.replace(tiny_model.config, remat=remat)
  return stirred(lean.attach(dataclasses.replace(tiny_model, config=config), 'dora', rank=2,
                             alpha=4., dropout=.5), .1)


def test_dropout_follows_the_step_s_key(tiny_model):
  model = dropping_model(tiny_model, False)
  plain = next_token(model.module)
  assert drops_out(model.params) and not drops_out(tiny_model.params)
  loss = dropping(plain)
  assert dropping(plain) is loss
  batch = dict(tokens=jnp.asarray(TOKENS))
  value = jax.jit(lambda key: loss(model.params, batch, key)[0])
  one, again, two = value(KEY), value(KEY), value(jax.random.key(1))
  assert one == again and one != two and one != plain(model.params, batch, KEY)[0]
  keys = with_keys(model.params, KEY)['layers']['mlp']['up']['kernel'].base.keys
  drawn = jax.vmap(lambda key: jax.random.bernoulli(key, .5, (64,)))(keys)
  assert drawn.shape == (2, 64) and bool((drawn[0] != drawn[1]).any())


@pytest.mark.slow
@pytest.mark.parametrize('remat', [False, True])
def test_the_gradient_s_layers_drop_what_the_loss_s_dropped(tiny_model, remat):
  model = dropping_model(tiny_model, remat)
  loss, batch = dropping(next_token(model.module)), dict(tokens=jnp.asarray(TOKENS))
  train, rest = tree.split(model.params, 'layers/mlp/up/kernel/base/b')
  f = jax.jit(lambda train: loss(tree.merge(train, rest), batch, KEY)[0])
  grad = jax.jit(jax.grad(f))(train)
  step = jax.tree.map(lambda g: 1e-2 * g / jnp.linalg.norm(g), grad)
  add = lambda sign: jax.tree.map(lambda x, d: x + sign * d, train, step)
  slope = (f(add(1)) - f(add(-1))) / 2e-2
  # float32 differences of losses near 6
  np.testing.assert_allclose(slope, jnp.linalg.norm(jax.tree.leaves(grad)[0]), rtol=2e-2)


@pytest.mark.slow
def test_training_with_dropout_differs_from_training_without(tiny_model, tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text(TEXT)
  train = lambda dropout: lean.train(
      lean.attach_lora(tiny_model, rank=2, dropout=dropout, where='layers/mlp/.*'), path, steps=2,
      batch=4, window=16, peak=1e-2)
  up = lambda model: model.params['layers']['mlp']['up']['kernel'].b
  dropped = train(.5)
  assert bool((up(dropped) != up(train(0.))).any())
  np.testing.assert_array_equal(up(dropped), up(train(.5)))
  assert dropped.params['layers']['mlp']['up']['kernel'].keys is None


def test_lora_plus_moves_b_so_much_faster():
  params = {'kernel': lora(dense(8, 6), 2, 4., key=KEY)}
  train, _ = tree.split(params, trained(params))
  grads = jax.tree.map(lambda x: jnp.ones_like(x) * .01, train)

  def first(**how):
    tx = adamw(steps=10, peak=1e-2, decay='constant', **how)
    state = tx.init(train)
    for _ in range(2):                                 # the rate of the first step is 0
      updates, state = tx.update(grads, state, train)
    return updates['kernel']
  plain, plus = first(), first(b_ratio=16.)
  np.testing.assert_allclose(plus.b, 16 * plain.b, rtol=1e-6)
  np.testing.assert_array_equal(plus.a, plain.a)
  tx, other = adamw(steps=10, peak=1e-2, b_ratio=2.), {'w': jnp.ones(3)}
  state = tx.init(other)
  with pytest.raises(lean.InputError, match='named b'):
    tx.update(other, state, other)


def test_dora_is_the_paper_s_equation_and_its_norm_gets_no_gradient():
  w = dora(dense(8, 6), 2, 4., key=KEY)
  np.testing.assert_allclose(w.magnitude, np.linalg.norm(w.base.base.value, axis=0), rtol=1e-6)
  w = jax.tree.map(lambda x: x + .1, w)
  low = w.base
  v = np.asarray(low.base.value) + 2 * np.asarray(low.a) @ np.asarray(low.b)
  norm = np.linalg.norm(v, axis=0)
  np.testing.assert_allclose(w.unbox(), np.asarray(w.magnitude) * v / norm, atol=1e-5)
  grad = jax.grad(lambda w: w.einsum('bi,io->bo', jnp.eye(8)).sum(), allow_int=True)(w)
  want = 2 * np.asarray(low.a).sum(0)[:, None] * np.asarray(w.magnitude) / norm
  np.testing.assert_allclose(grad.base.b, want, rtol=1e-4)
  zeros = dora(Dense(jnp.zeros((4, 3)), 'io', (None, None)), 1, 1., key=KEY)
  np.testing.assert_array_equal(zeros.unbox(), np.zeros((4, 3)))


def test_vera_shares_its_random_matrices():
  wide, narrow = vera(dense(8, 6), 3, 8), vera(dense(5, 4), 3, 8)
  np.testing.assert_array_equal(narrow.inner, wide.inner[:5])
  np.testing.assert_array_equal(narrow.outer, wide.outer[:, :4])
  assert float(jnp.abs(wide.inner).max()) <= (6 / 8) ** .5
  other = vera(dense(8, 6), 3, 8, seed=1)
  assert bool((other.inner != wide.inner).all())
  stacked = vera(dense(2, 8, 6, dims='nio'), 3, 8)
  np.testing.assert_array_equal(stacked.inner, jnp.stack([wide.inner] * 2))


def test_pissa_is_the_principal_part_over_the_rest(tiny_model):
  w = dense(2, 8, 6, dims='nio')
  made = pissa(w, 2)
  np.testing.assert_allclose(made.unbox(), w.value, atol=1e-5)
  left = jnp.linalg.svd(made.base.value, compute_uv=False)
  np.testing.assert_allclose(left[:, :4], jnp.linalg.svd(w.value, compute_uv=False)[:, 2:],
                             atol=1e-5)
  rounded = pissa(w, 2, 'nf4-g8')
  assert isinstance(rounded.base, Quantized)
  away = lambda x: float(jnp.linalg.norm(x.unbox() - w.value))
  assert away(rounded) < away(rtn(w, 'nf4-g8'))
  with pytest.raises(lean.InputError, match='float model'):
    pissa(rtn(w, 'w8a16'), 2)
  model = lean.attach(tiny_model, 'pissa', rank=3)
  np.testing.assert_allclose(model.logits(TOKENS), tiny_model.logits(TOKENS), atol=1e-4)


def test_ia3_is_where_its_paper_has_it(tiny_model):
  model = lean.attach(tiny_model, 'ia3')
  sides = {n: w.side for n, w in tree.named_weights(model.params).items() if isinstance(w, Adapter)}
  assert sides == {'layers/attention/k/kernel': 'o', 'layers/attention/v/kernel': 'o',
                   'layers/mlp/down/kernel': 'i'}


def test_ia3_scales_biases_with_their_products(tiny_model):
  config = dataclasses.replace(tiny_model.config, attention=AttentionOptions(bias=True))
  params = jax.jit(config.module.init)(KEY, jnp.zeros((1, 4), jnp.int32))['params']
  fresh = dataclasses.replace(tiny_model, config=config, params=params)
  base = dataclasses.replace(fresh, params=jax.tree.map(                 # biases that are not 0
      lambda x: x + .5 * (x == 0), fresh.params))
  model = stirred(lean.attach(base, 'ia3'), .3)
  attention = lambda m: m.params['layers']['attention']
  merged = lean.merge(model)
  by = attention(model)['v']['kernel'].by
  np.testing.assert_allclose(attention(merged)['v']['bias'], attention(base)['v']['bias'] * by)
  np.testing.assert_allclose(merged.logits(TOKENS), model.logits(TOKENS), atol=1e-4)
  twice = stirred(lean.attach(model, 'ia3', where='layers/attention/v/kernel', side='outputs'), .3)
  np.testing.assert_allclose(lean.merge(twice).logits(TOKENS), twice.logits(TOKENS), atol=1e-4)


def test_bitfit_trains_biases_alone(tiny_model, tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text(TEXT)
  config = dataclasses.replace(tiny_model.config, attention=AttentionOptions(bias=True))
  params = jax.jit(config.module.init)(KEY, jnp.zeros((1, 4), jnp.int32))['params']
  model = dataclasses.replace(tiny_model, config=config, params=params)
  after = lean.train(model, path, steps=2, batch=4, window=16, peak=1e-2, trainable=BIASES)
  before, now = (tree.named_arrays(m.params) for m in (model, after))
  moved = {n for n in before if bool((before[n] != now[n]).any())}
  of = lambda names: {f'layers/attention/{x}/bias' for x in names}
  assert of('qv') <= moved <= of('qkv')
  with pytest.raises(lean.InputError, match='matches no array'):
    lean.train(tiny_model, path, steps=2, batch=4, window=16, trainable=BIASES)


def test_adapters_upon_adapters_train_and_merge_together():
  w = lora(dora(dense(8, 6), 2, 4., key=KEY), 1, 1., key=KEY)
  params = {'kernel': w}
  train, _ = tree.split(params, trained(params))
  assert set(tree.named_arrays(train)) == {
      'kernel/a', 'kernel/b', 'kernel/base/magnitude', 'kernel/base/base/a', 'kernel/base/base/b'}
  assert isinstance(w, LowRank) and isinstance(w.base, Magnitude) and isinstance(bare(w), Dense)


@pytest.mark.parametrize(('method', 'settings', 'said'), [
    ('lore', {}, 'there are: lora, dora'), ('lora', dict(rank=2), 'takes'),
    ('lora', dict(rank=2, alpha=1., scaling='root'), 'rank_stabilised'),
    ('lora', dict(rank=2, alpha=1., dropout=1.), 'dropout'),
    ('dora', dict(rank=99, alpha=1.), '99'),
    ('vera', dict(rank=2, inputs=16), 'more than the 16'), ('ia3', dict(side='both'), 'inputs'),
    ('pissa', dict(rank=0), 'rank'),
    ('vera', dict(rank=2, where='nothing/.*'), 'matches no weight'),
    ('lora', dict(rank=2, alpha=1., rules=[('x/.*', {})]), 'matches no weight')])
def test_bad_settings_are_refused(tiny_model, method, settings, said):
  with pytest.raises(lean.InputError, match=said):
    lean.attach(tiny_model, method, **settings)
