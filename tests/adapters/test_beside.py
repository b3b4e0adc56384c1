"""What stands beside the weights: bottlenecks, prefixes and soft prompts."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.trained import trained
from lean_jax.models.cache import empty_cache
from lean_jax.models.encoder import EncoderConfig
from lean_jax.models.families import family_of
from lean_jax.models.frame import framed
from lean_jax.models.prefix import settled
from lean_jax.objectives.forward import targets
from lean_jax.objectives.language_modeling import next_token
from lean_jax.weights.beside import Prefix
from tests.adapters.stirring import stirred
from tests.models.test_packing import CONFIGS, fresh

TOKENS = np.random.default_rng(4).integers(3, 90, (2, 12))
BOTTLENECKS = dict(houlsby=dict(rank=4), pfeiffer=dict(rank=4), parallel=dict(rank=4))
BEFORE = dict(prefix=dict(tokens=3, hidden=8), p_tuning_v2=dict(tokens=3), prompt=dict(tokens=3))


def model(name, tiny_model, **change):
  module, params = fresh(name, **change)
  family = family_of(dict(model_type=name))
  return lean.Model(family, module.config, params, tiny_model.tokenizer)


@pytest.fixture(scope='module')
def llama(tiny_model):
  return model('llama', tiny_model, vocab_size=280, num_hidden_layers=1)


def logits(m):
  return np.asarray(m.logits(TOKENS))


@pytest.mark.parametrize('method', ['houlsby', *(pytest.param(m, marks=pytest.mark.slow)
                                                 for m in ('pfeiffer', 'parallel'))])
def test_a_bottleneck_starts_as_nothing_and_is_where_its_paper_has_it(llama, method):
  made = lean.attach(llama, method, **BOTTLENECKS[method])
  np.testing.assert_array_equal(logits(made), logits(llama))
  made = stirred(made, .1)
  found = {n.split('/')[1] for n in trained(made.params).replace('\\', '').split('|')}
  assert found == {'feed_forward_adapter'} | (
      {'mixer_adapter'} if method == 'houlsby' else set())
  assert np.abs(logits(made) - logits(llama)).max() > .01
  np.testing.assert_allclose(logits(lean.scan_layers(made, False)), logits(made), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mamba', 'jamba', 't5', 'deepseek_v3'])
def test_other_kinds_of_layers_have_bottlenecks_too(tiny_model, name):
  base = model(name, tiny_model)
  made = stirred(lean.attach(base, 'houlsby', rank=2), .1)
  more = dict(decoder_tokens=TOKENS[:, 6:]) if name == 't5' else {}
  one, other = (np.asarray(m.logits(TOKENS[:, :6], **more)) for m in (made, base))
  assert np.abs(one - other).max() > 1e-3


def through_cache(m, params):
  """Logits of TOKENS through a cache: ten of them at once, and then one by one."""
  run = jax.jit(lambda tokens, cache, offset: m.module.apply(
      {'params': params}, tokens, cache, offset))
  one, cache = run(TOKENS[:, :10], empty_cache(m.config, 2, 16), 0)
  two, cache = run(TOKENS[:, 10:11], cache, 10)
  return np.concatenate([one, two, run(TOKENS[:, 11:], cache, 11)[0]], axis=1)


@pytest.mark.parametrize(('name', 'method'), [
    ('llama', 'prompt'), *(pytest.param(*pair, marks=pytest.mark.slow)
    for pair in (('llama', 'prefix'), ('llama', 'p_tuning_v2'), ('gemma2', 'prefix'),
                 ('gpt2', 'prompt'), ('gpt2', 'prefix'), ('gpt_oss', 'p_tuning_v2'),
                 ('gemma2', 'prompt')))])
def test_what_is_written_with_a_prefix_is_what_whole_texts_give(tiny_model, llama, name, method):
  base = llama if name == 'llama' else model(name, tiny_model)
  m = stirred(lean.attach(base, method, **BEFORE[method]), .3)
  want = logits(m)
  assert np.abs(want - logits(base)).max() > .02
  np.testing.assert_allclose(through_cache(m, m.params), want, atol=2e-4)
  once = settled(m.module, m.params)
  assert isinstance(once['prefix'], Prefix) and 'prompt' not in once
  assert settled(m.module, once) is once
  np.testing.assert_allclose(through_cache(m, once), want, atol=2e-4)
  padded = np.concatenate([np.full((2, 3), 5), TOKENS], axis=1)
  mask = np.arange(15)[None] >= np.array([[3], [3]])
  np.testing.assert_allclose(m.logits(padded, mask)[:, 3:], want, atol=2e-4)


@pytest.mark.slow
def test_generation_with_a_prompt_is_greedy_by_whole_texts(tiny_model):
  m = stirred(lean.attach(tiny_model, 'prompt', tokens=3), .3)
  from lean_jax.generation.text import write
  text = 'the quick brown'
  ids = m.tokenizer.encode(text)[None]
  ids = np.concatenate([np.int32(m.tokenizer.head)[None], ids], axis=1)
  for _ in range(4):
    ids = np.concatenate([ids, np.asarray(m.logits(ids))[:, -1:].argmax(-1)], axis=1)
  out = write(m, text, tokens=4)
  assert out.texts[0][0] == m.tokenizer.decode(ids[0, -4:])
  with pytest.raises(lean.InputError, match='the context has 64'):
    write(m, text, tokens=64 - len(m.tokenizer.encode(text)) - 3)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['prompt', 'prefix'])
def test_packed_texts_have_the_prefix_each_and_its_gradient(llama, method):
  m = stirred(lean.attach(llama, method, **BEFORE[method]), .3)
  train, rest = tree.split(m.params, trained(m.params))
  loss = next_token(m.module)

  def summed(train, batch):
    return loss(tree.merge(train, rest), batch, None)[0] * jnp.sum(targets(batch)[1])
  run = jax.jit(jax.value_and_grad(summed))
  rows = dict(tokens=TOKENS, mask=np.arange(12)[None] < np.array([[12], [7]]))
  segments = np.repeat([1, 2, 0], [12, 7, 5])[None]
  got = run(train, dict(tokens=TOKENS.reshape(1, 24), segments=segments))
  want = run(train, rows)
  most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want[1]))
  assert most > 1e-3
  # float32 sums in another order
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * most), got[1], want[1])


def both(llama):
  made = lean.attach(lean.attach(llama, 'houlsby', rank=2), 'p_tuning_v2', tokens=2)
  return stirred(made, .1)


def test_they_are_saved_and_loaded_and_what_would_lose_them_is_refused(llama, tmp_path):
  m = both(llama)
  lean.save(m, tmp_path / 'm')
  again = lean.load(tmp_path / 'm')
  assert jax.tree.structure(again.params) == jax.tree.structure(m.params)
  jax.tree.map(np.testing.assert_array_equal, again.params, m.params)
  for bad in (lambda: lean.save(m, tmp_path / 'hf', format='hf'),
              lambda: lean.rotate(m, jax.random.key(0)),
              lambda: lean.distill(m, [], keep=1, steps=1)):
    with pytest.raises(lean.InputError, match='beside its weights cannot be'):
      bad()
  with pytest.raises(lean.InputError, match='no bottlenecks'):
    lean.save_adapter(m, tmp_path / 'a')


@pytest.mark.slow
def test_other_methods_leave_them_alone(llama):
  m = both(lean.quantize(llama, 'w4a16-g16'))
  lora = lean.attach_lora(m, rank=2)
  np.testing.assert_allclose(logits(lora), logits(m), atol=1e-5)
  np.testing.assert_allclose(logits(lean.merge(lora)), logits(m), atol=1e-4)
  assert {'prefix/k', 'layers/mixer_adapter/down', 'layers/mlp/up/kernel/a'} <= set(
      trained(lora.params).replace('\\', '').split('|'))
  rounded = lean.quantize(both(llama), 'w8a16')
  assert isinstance(rounded.params['prefix'], Prefix)


@pytest.mark.slow
def test_a_prefix_before_an_encoder_changes_every_token(tiny_model):
  config = EncoderConfig(vocabulary=40, width=16, layers=2, heads=4, groups=2, head_width=8,
                         hidden=24, context=32)
  params = jax.jit(config.module.init)(jax.random.key(0), TOKENS % 40)['params']
  base = lean.Model(family_of(dict(model_type='bert')), config, params,
                    tiny_model.tokenizer)
  m = lean.attach(base, 'p_tuning_v2', tokens=2)
  run = lambda m: np.asarray(m.module.apply({'params': m.params}, TOKENS % 40)[0])
  assert (np.abs(run(m) - run(base)).max(axis=-1) > 1e-3).all()
  with pytest.raises(lean.InputError, match='depends on them'):
    lean.attach(base, 'prompt')


def bare(name):
  """A model of a family without parameters: enough for what looks at its config."""
  hf = json.loads((CONFIGS / f'{name}.json').read_text())
  if name == 'phi3':
    factors = [1.] * 8
    hf |= dict(original_max_position_embeddings=32, rope_parameters=dict(
        rope_type='longrope', rope_theta=1e4, short_factor=factors, long_factor=factors))
  family = family_of(hf)
  return lean.Model(family, family.from_hf(hf), dict(layers={}), None)


@pytest.mark.parametrize(('name', 'method', 'settings', 'said'), [
    ('llama', 'houlsby', dict(rank=33), 'bottlenecks of 33; give 1 to 32'),
    ('llama', 'houlsby', dict(activation='sine'), "no activation 'sine'"),
    ('llama', 'houlsby', dict(alpha=2.), "no setting 'alpha'"),
    ('llama', 'prefix', dict(where='layers/.*'), 'is on no weights'),
    ('llama', 'prompt', dict(tokens=0), '0 tokens before'),
    ('llama', 'prefix', dict(hidden=0), 'an MLP of 0'),
    ('mamba', 'prefix', {}, 'mamba layers have none'), ('mamba', 'pfeiffer', dict(rank=2),
                                                        'no layer has'),
    ('bert', 'prompt', {}, 'depends on them'),
    ('phi3', 'p_tuning_v2', {}, 'LongRoPE')])
def test_what_cannot_stand_there_is_refused(name, method, settings, said):
  with pytest.raises(lean.InputError, match=said):
    lean.attach(bare(name), method, **settings)


def test_a_prefix_that_does_not_fit_is_refused(llama):
  with pytest.raises(lean.InputError, match='prompt already'):
    lean.attach(lean.attach(llama, 'prompt'), 'prefix')
  m = lean.attach(llama, 'p_tuning_v2', tokens=2)
  short = dataclasses.replace(m.params['prefix'], k=m.params['prefix'].k[..., :1])
  with pytest.raises(lean.InputError, match='a prefix of 1 layers, 2 key heads of 1; the model'):
    logits(dataclasses.replace(m, params=m.params | dict(prefix=short)))
  with pytest.raises(lean.InputError, match='12 tokens after a prefix of 2 are more than the 13'):
    framed(dataclasses.replace(llama.config, positions=13), TOKENS, None, 0, None,
           prefix=m.params['prefix'])
