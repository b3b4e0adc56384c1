"""The experiment on adapters measures what it says, and says what fails."""
import copy

import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.trained import trained
from lean_jax.experiments import adapters
from lean_jax.pipeline.on_text import told_of_seeds

FIGURES = {
    adapters: dict(
        base=dict(perplexity=9.), nf4=dict(perplexity=9.9, left=.1),
        full=dict(perplexity=5., parameters=1000), lora_few=dict(perplexity=5.1, parameters=9),
        lora=dict(perplexity=4.9, parameters=99),
        qlora=dict(perplexity=5., parameters=99, left=.02))}


@pytest.mark.parametrize(('experiment', 'variant', 'figure', 'value', 'fails'), [
    (adapters, 'lora_few', 'parameters', 9, 0), (adapters, 'lora_few', 'parameters', 13, 1),
    (adapters, 'lora_few', 'perplexity', 5.3, 1), (adapters, 'lora', 'perplexity', 9., 1),
    (adapters, 'qlora', 'perplexity', float('nan'), 1), (adapters, 'qlora', 'left', .3, 1)])
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


@pytest.mark.slow
def test_the_experiment_trains_every_variant(wide, tmp_path):
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
