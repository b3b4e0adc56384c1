"""The experiments on adapters and prompts measure what they say, and say what fails."""
import copy
import csv
import types

import jax
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.trained import trained
from lean_jax.experiments import adapters, prompts
from lean_jax.pipeline.on_text import told_of_seeds
from lean_jax.training.finetune import example_windows

FIGURES = {
    adapters: dict(
        base=dict(perplexity=9.), nf4=dict(perplexity=9.9, left=.1),
        full=dict(perplexity=5., parameters=1000), lora_few=dict(perplexity=5.1, parameters=9),
        lora=dict(perplexity=4.9, parameters=99),
        qlora=dict(perplexity=5., parameters=99, left=.02)),
    prompts: {
        'parameters': prompts.SHARES, 'sst2 full': dict(accuracy=.85, near=.82),
        'sst2 head': dict(accuracy=.8), 'e2e frozen': dict(nats=3.),
        'e2e full': dict(nats=1., rouge_l=.6, near=.57),
        **{f'sst2 {name}': dict(accuracy=.84, share=.009) for name in prompts.SENTIMENT},
        **{f'e2e {name}': dict(nats=1.1, rouge_l=.58, share=.02) for name in prompts.RESTAURANTS}}}


@pytest.mark.parametrize(('experiment', 'variant', 'figure', 'value', 'fails'), [
    (adapters, 'lora_few', 'parameters', 9, 0), (adapters, 'lora_few', 'parameters', 13, 1),
    (adapters, 'lora_few', 'perplexity', 5.3, 1), (adapters, 'lora', 'perplexity', 9., 1),
    (adapters, 'qlora', 'perplexity', float('nan'), 1), (adapters, 'qlora', 'left', .3, 1),
    (prompts, 'sst2 pfeiffer', 'accuracy', .84, 0), (prompts, 'sst2 houlsby', 'accuracy', .79, 1),
    (prompts, 'sst2 p_tuning_v2', 'accuracy', .6, 2), (prompts, 'e2e prefix', 'nats', 9.5, 1),
    (prompts, 'e2e pfeiffer', 'rouge_l', .5, 1), (prompts, 'sst2 houlsby', 'share', .2, 1),
    (prompts, 'sst2 lora', 'share', .012, 1)])
def test_a_claim_holds_or_fails_by_the_mean(experiment, variant, figure, value, fails, capsys):
  found = [FIGURES[experiment], copy.deepcopy(FIGURES[experiment])]
  found[1][variant][figure] = value
  assert told_of_seeds(found, experiment.claims()) == (fails > 0)
  lines = [line for line in capsys.readouterr().out.splitlines() if line[:4] in ('pass', 'FAIL')]
  assert len(lines) == len(experiment.claims())
  assert sum(line.startswith('FAIL') for line in lines) == fails


def test_adapters_begin_as_the_model_and_few_are_as_many_as_one_per_cent_has_room_for(wide):
  starts = adapters.starts(wide, 0)
  size = {name: adapters.count(start, trained(start.params) or '.*')
          for name, (start, _) in starts.items()}
  total = tree.parameters(wide.params)
  assert size['full'] == total and size['lora'] == size['qlora'] > total / 10
  few = tree.named_weights(starts['lora_few'][0].params)
  ranks = {n.split('/')[2]: w.a.shape[-1] for n, w in few.items() if hasattr(w, 'a')}
  assert ranks.keys() == {'q', 'v'}
  assert size['lora_few'] < .01 * total <= size['lora_few'] * (ranks['q'] + 1) / ranks['q']
  tokens = np.arange(12).reshape(2, 6)
  for name in ('lora_few', 'lora'):
    np.testing.assert_allclose(starts[name][0].logits(tokens), wide.logits(tokens), atol=1e-5)


@pytest.fixture(scope='module')
def wide(tiny_model):
  """The tiny model with rows that NF4's groups divide."""
  return lean.create(tiny_model, hidden_size=64, head_dim=32, intermediate_size=64,
                     num_hidden_layers=1)


def test_short_sentences_and_unseen_restaurants(tmp_path):
  (tmp_path / 'dev.tsv').write_text('fine\t1\nnot so\t0\n' + 'very ' * 25 + 'long\t1\n')
  assert prompts.sentences(tmp_path / 'dev.tsv') == [
      dict(text='fine', label='positive'), dict(text='not so', label='negative')]
  with (tmp_path / 'devset.csv').open('w', newline='') as file:
    rows = csv.writer(file)
    rows.writerows([('mr', 'ref'), *((f'name[{k // 2}]', f'It is "{k}", here.')
                                     for k in range(44))])
  known, unseen = prompts.restaurants(tmp_path / 'devset.csv')
  assert list(unseen) == ['name[0]', 'name[5]', 'name[10]', 'name[15]', 'name[20]']
  assert len(known) == 22 - 5 and not known.keys() & unseen.keys()
  assert known['name[1]'] == ['It is "2", here.', 'It is "3", here.']


def test_nats_are_those_of_the_answers_whatever_is_packed(tiny_model):
  records = [dict(instruction=f'say {word}', output=f'{word} fox') for word in ('the', 'dog', 'a')]
  windows = lambda packing: example_windows(tiny_model, records, window=64, packing=packing,
                                            template=prompts.TEMPLATE)
  prefixed = lean.attach(tiny_model, 'prefix', tokens=3, hidden=4)
  for model in (tiny_model, prefixed):
    assert prompts.nats(model, windows(True)) == pytest.approx(
        prompts.nats(model, windows(False)), abs=1e-4)


def test_rouge_is_of_the_line_that_is_written(tiny_model, monkeypatch):
  texts = {'one\n': 'a b c', 'two\n': 'x y'}
  monkeypatch.setattr(prompts, 'write', lambda model, asked, **how: types.SimpleNamespace(
      texts=[(texts[line],) for line in asked]))
  assert prompts.rouge(tiny_model, dict(one=['a c', 'a b d'], two=['z'])) == pytest.approx(.8 / 2)


def test_a_share_is_of_the_prefix_without_its_mlp(tiny_model):
  total, config = tree.parameters(tiny_model.params), tiny_model.config
  for method, settings in (('prefix', dict(hidden=40)), ('p_tuning_v2', {})):
    found = prompts.share(lean.attach(tiny_model, method, tokens=5, **settings))
    own = config.layers * 2 * 5 * config.groups * config.head_width
    assert found == pytest.approx(own / total)


@pytest.mark.slow
def test_experiments_train_every_variant(wide, tmp_path, monkeypatch):
  from lean_jax.data.sources import open_source
  from lean_jax.data.windows import pack
  text = tmp_path / 'text.txt'
  text.write_text('\n\n'.join(f'the quick brown fox {k} jumps over the dog' for k in range(300)))
  train, test = (pack(open_source(str(text)), split, wide.tokenizer, 16, tmp_path / 'windows')
                 for split in ('train', 'test'))
  found = adapters.measured(wide, train, test, 0, steps=2, batch=2)
  for claim in adapters.claims():
    for side in ('left', 'right'):
      variant, figure = claim[side].split('.')
      assert np.isfinite(found[variant][figure])
  said = {f'say {word}': [f'{word} fox', f'a {word} dog'] for word in ('the', 'dog', 'a')}
  for name, small in (('WINDOW', 32), ('SAID', 4), ('READ', 2)):
    monkeypatch.setattr(prompts, name, small)
  encoder = lean.create('bert', wide.tokenizer, hidden_size=64, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=64, max_position_embeddings=32)
  rows = [dict(text=text, label=label) for text, label in (
      ('the fox', 'positive'), ('the dog', 'negative'))] * 8
  found = {'parameters': prompts.SHARES,
           **prompts.told_of(wide, said, said, 0, steps=2, batch=2),
           **prompts.sentiment(encoder, rows, rows, 0, steps=2, batch=4)}
  for claim in prompts.claims():
    for side in ('left', 'right'):
      variant, figure = claim[side].split('.')
      assert np.isfinite(found[variant][figure])
  jax.clear_caches()
