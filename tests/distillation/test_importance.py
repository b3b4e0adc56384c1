"""What matters of a model: against float64, and what of it can be cut without a trace."""
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import methods
from lean_jax.distillation.importance import block_influence, importance
from lean_jax.distillation.losses import tapped
from lean_jax.distillation.narrow import best, cut, narrowed
from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.models.families import FAMILIES
from lean_jax.nn.mamba import MambaOptions
from lean_jax.nn.taps import HEADS, SCORES, STATES
from lean_jax.objectives.forward import forward, run

CONFIG = DecoderConfig(vocabulary=32, width=16, layers=3, heads=4, groups=2, head_width=4,
                       hidden=12, context=8)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 8))
MASK = np.arange(8)[None] < np.array([8, 5, 8, 3])[:, None]
WHOLE = dict(tokens=jnp.asarray(TOKENS), mask=jnp.asarray(MASK))
BATCHES = [dict(tokens=jnp.asarray(TOKENS[k:k + 2]), mask=jnp.asarray(MASK[k:k + 2]))
           for k in (0, 2)]


def changed(params, path, change):
  """The tree with the value of the weight at 'a/b' changed."""
  head, _, rest = path.partition('/')
  if not rest:
    return {**params, head: params[head].replace_boxed(change(params[head].value))}
  return {**params, head: changed(params[head], rest, change)}


def without(params, config, heads=(), hidden=(), channels=()):
  """With parts that do nothing: (layer, number) of heads and hidden units; channels."""
  K = config.head_width
  for n, h in heads:
    params = changed(params, 'layers/attention/o/kernel',
                     lambda w, n=n, h=h: w.at[n, h * K:h * K + K].set(0))
    g = h // (config.heads // config.groups)
    params = changed(params, 'layers/attention/v/kernel',
                     lambda w, n=n, g=g: w.at[n, :, g * K:g * K + K].multiply(1e-3))
  for n, f in hidden:
    params = changed(params, 'layers/mlp/up/kernel', lambda w, n=n, f=f: w.at[n, :, f].set(0))
  for d in channels:
    params = changed(params, 'embed/table', lambda w, d=d: w.at[:, d].set(0))
    for path in ('attention/o', 'mlp/down'):
      params = changed(params, f'layers/{path}/kernel', lambda w, d=d: w.at[:, :, d].set(0))
  return params


@pytest.fixture(scope='module')
def params():
  return jax.jit(CONFIG.module.init)(jax.random.key(0), TOKENS)['params']


@pytest.fixture(scope='module')
def found(params):
  return importance(CONFIG, params, BATCHES)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
  return forward(config.module, params, dict(tokens=jnp.asarray(TOKENS)))[0]


def test_block_influence_is_its_formula_and_of_an_idle_layer_nothing(params):
  idle = params
  for path in ('attention/o', 'mlp/down'):
    idle = changed(idle, f'layers/{path}/kernel', lambda w: w.at[1].set(0))
  got = block_influence(CONFIG, idle, BATCHES)
  shown = tapped(CONFIG, jax.jit(lambda p: run(CONFIG.module, p, WHOLE, (STATES,))[2])(idle))
  states = [np.asarray(x, np.float64)[MASK] for x in (
      shown.embedding, *(layer['hidden'] for layer in shown.layers))]
  want = [1 - np.mean([x @ y / np.sqrt(x @ x * (y @ y)) for x, y in zip(a, b)])
          for a, b in itertools.pairwise(states)]
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert abs(got[1]) < 1e-6 and min(got[0], got[2]) > 1e-3
  config, fewer = cut(CONFIG, idle, BATCHES, 2, {})
  assert config.layers == 2
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::2]), fewer['layers'],
               idle['layers'])


def test_scores_are_means_over_a_text_and_the_l2_norm_over_texts(params, found):
  written = dataclasses.replace(CONFIG, layers=1)
  first = jax.tree.map(lambda x: x[:1], params['layers'])
  seen = {}

  def note(path, x):
    seen[path] = np.asarray(x, np.float64)
    return x
  one = {k: jax.tree.map(lambda x: x[0], v) for k, v in first.items()}
  table = np.asarray(params['embed']['table'].value, np.float64)
  x = table[TOKENS]
  rms = lambda x, scale: x / np.sqrt((x * x).mean(-1, keepdims=True) + written.epsilon) * scale
  normed = note('mixer', rms(x, np.asarray(one['mixer_norm']['scale'])))
  taps = jax.jit(lambda p: run(CONFIG.module, p, WHOLE, (HEADS, SCORES))[2])(params)
  shown = tapped(CONFIG, taps).layers[0]
  scores = np.asarray(shown['scores'], np.float64)
  probs = np.exp(scores - scores.max(-1, keepdims=True))
  probs /= probs.sum(-1, keepdims=True)
  values = np.repeat(np.asarray(shown['values'], np.float64), 2, axis=2)      # [B S H K]
  heads = note('heads', np.linalg.norm(np.einsum('bhts,bshk->bthk', probs, values), axis=-1))
  score = lambda x: np.sqrt(sum(np.abs(row[real]).mean(0) ** 2 for row, real in zip(x, MASK)))
  np.testing.assert_allclose(found.heads[0], score(heads), rtol=1e-4)
  o = np.asarray(one['attention']['o']['kernel'].value, np.float64)
  x = x + np.einsum('bhts,bshk->bthk', probs, values).reshape(4, 8, -1) @ o
  h = rms(x, np.asarray(one['feed_forward_norm']['scale']))
  gate, up = (h @ np.asarray(one['mlp'][n]['kernel'].value, np.float64) for n in ('gate', 'up'))
  np.testing.assert_allclose(found.hidden[0], score(gate / (1 + np.exp(-gate)) * up), rtol=1e-4)
  later = [np.asarray(layer) for layer in found.hidden]
  assert len(later) == 3 and found.channels.shape == (16,)
  alone = importance(written, {**params, 'layers': first}, BATCHES)
  np.testing.assert_allclose(alone.channels, score(normed) + score(h), rtol=1e-4)


@pytest.mark.slow
def test_what_does_nothing_is_cut_without_a_trace(params, found):
  """A dead head leaves its group a live one; layers lose different parts."""
  idle = without(params, CONFIG, hidden=[(n, f) for n in range(3) for f in (n, n + 5, 11)])
  config, smaller = cut(CONFIG, idle, BATCHES, None, dict(hidden=9))
  assert config.hidden == 9 and smaller['layers']['mlp']['gate']['kernel'].shape == (3, 16, 9)
  np.testing.assert_allclose(logits(config, smaller), logits(CONFIG, idle), atol=1e-5)
  quiet = without(params, CONFIG, heads=[(0, 0), (0, 1), (1, 2), (1, 3), (2, 0), (2, 1)])
  config, smaller = cut(CONFIG, quiet, BATCHES, None, dict(groups=1))
  assert (config.heads, config.groups) == (2, 1)
  np.testing.assert_allclose(logits(config, smaller), logits(CONFIG, quiet), atol=1e-5)
  config, smaller = narrowed(CONFIG, params, found, heads=2)
  assert (config.heads, config.groups) == (2, 2)
  for n in range(3):
    kept = [int(np.argmax(found.heads[n][2 * g:2 * g + 2])) + 2 * g for g in range(2)]
    whole = params['layers']['attention']['q']['kernel'].value[n].reshape(16, 4, 4)
    np.testing.assert_array_equal(smaller['layers']['attention']['q']['kernel'].value[n],
                                  whole[:, kept].reshape(16, -1))


@pytest.mark.slow
def test_channels_that_are_0_are_cut_but_for_the_norms_mean(params):
  idle = without(params, CONFIG, channels=[3, 7, 8, 15])
  config, smaller = cut(CONFIG, idle, BATCHES, None, dict(width=12))
  # The mean square is now of 12 channels, not of 16.
  scaled = jax.tree_util.tree_map_with_path(
      lambda path, x: x * (16 / 12) ** .5 if 'norm' in str(path) else x, smaller)
  exact = lambda c: dataclasses.replace(c, epsilon=0.)
  np.testing.assert_allclose(logits(exact(config), scaled), logits(exact(CONFIG), idle), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('scan', [True, False])
def test_a_student_is_cut_and_saved(tiny_model, tmp_path, scan):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 60)
  model = lean.scan_layers(tiny_model, scan)
  text = tmp_path / 'text.txt'
  small = lean.cut(model, text, layers=1, hidden=20, heads=1, width=24, window=16, samples=8)
  c = small.config
  assert (c.layers, c.hidden, c.heads, c.groups, c.width, c.scan_layers) == (1, 20, 1, 1, 24, scan)
  lean.save(small, tmp_path / 'out', format='hf')
  np.testing.assert_allclose(lean.load(tmp_path / 'out').logits(TOKENS), small.logits(TOKENS),
                             atol=1e-5)


@pytest.mark.slow
def test_a_student_begins_by_importance_or_at_random(tiny_model, tmp_path):
  text = tmp_path / 'text.txt'
  text.write_text('the old fox sees the lazy dog\n' * 60)
  begun = {init: lean.distill(tiny_model, text, init=init, keep=1, steps=1, peak=1e-12, window=16,
                              batch=8, seed=1) for init in ('importance', 'random')}
  one = lean.cut(tiny_model, text, layers=1, window=16)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
               begun['importance'].params, one.params)
  table = [m.params['embed']['table'].value for m in (begun['random'], tiny_model)]
  assert table[0].shape == table[1].shape and not np.allclose(*table)


def test_what_cannot_be_cut_is_refused(params, found, tiny_model, tmp_path):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 60)
  for given, says in ((dict(hidden=0), 'hidden 0 of a model of 12'), (dict(width=17), 'width 17'),
                      (dict(heads=3, groups=2), '3 in 2 groups, of 4 in 2'),
                      (dict(groups=3), 'groups 3'), (dict(heads='2'), "heads '2'")):
    with pytest.raises(InputError, match=says):
      narrowed(CONFIG, params, found, **given)
  with pytest.raises(InputError, match='layers 4 of a model of 3'):
    cut(CONFIG, params, BATCHES, 4, {})
  rounded = methods.apply(params, (dict(where='layers/.*', method='rtn', spec='w8a16'),), None)
  with pytest.raises(InputError, match='not a matrix of floats'):
    narrowed(CONFIG, rounded, found, hidden=4)
  mixed = dataclasses.replace(CONFIG, kinds=(Layer(), Layer('mamba', None), Layer()),
                              mamba=MambaOptions(inner=32, state=4, rank=2))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(
      mixed.module.init, jax.random.key(0), TOKENS)['params'])
  for given, says in ((dict(heads=2, groups=1), 'attention, which layer 1'),
                      (dict(hidden=4), 'an MLP, which layer 1')):
    other = found._replace(heads=[found.heads[0], None, found.heads[2]],
                           hidden=[found.hidden[0], None, found.hidden[2]])
    with pytest.raises(InputError, match=says):
      narrowed(mixed, zeros, other, **given)
  pair = EncoderDecoderConfig(encoder=CONFIG, decoder=CONFIG, start=1)
  with pytest.raises(InputError, match='layers of one stack'):
    cut(pair, {}, BATCHES, 1, {})
  with pytest.raises(InputError, match='nothing to cut'):
    lean.cut(tiny_model, tmp_path / 'text.txt')
  with pytest.raises(InputError, match="init 'best'.*alternating, importance, random"):
    lean.distill(tiny_model, tmp_path / 'text.txt', init='best', steps=1)


@pytest.mark.slow
def test_a_family_whose_config_does_not_say_a_heads_width_keeps_it(tiny_model, tmp_path):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 60)
  hf = dict(FAMILIES['gpt2'].to_hf(dataclasses.replace(
      FAMILIES['gpt2'].from_hf(dict(n_embd=32, n_head=4, n_layer=2, n_positions=64,
                                    vocab_size=tiny_model.config.vocabulary)))))
  config = FAMILIES['gpt2'].from_hf(hf)
  params = jax.jit(config.module.init)(jax.random.key(0), TOKENS)['params']
  model = lean.Model(FAMILIES['gpt2'], config, params, tiny_model.tokenizer)
  with pytest.raises(InputError, match='a gpt2 cut like this has a head_width'):
    lean.cut(model, tmp_path / 'text.txt', groups=2, window=16)
  small = lean.cut(model, tmp_path / 'text.txt', groups=2, width=16, hidden=64, window=16)
  gemma = lean.Model(FAMILIES['gemma'], dataclasses.replace(
      tiny_model.config, norm_offset=1., embedding_scale=32 ** .5, mlp=dataclasses.replace(
          tiny_model.config.mlp, activation='gelu_tanh')), tiny_model.params, tiny_model.tokenizer)
  with pytest.raises(InputError, match='a gemma cut like this has a embedding_scale'):
    lean.cut(gemma, tmp_path / 'text.txt', width=16, window=16)
  lean.save(small, tmp_path / 'out', format='hf')
  np.testing.assert_allclose(lean.load(tmp_path / 'out').logits(TOKENS), small.logits(TOKENS),
                             atol=1e-5)


def test_the_best_are_in_order():
  np.testing.assert_array_equal(best([1., 5., 2., 5.], 3), [1, 2, 3])
