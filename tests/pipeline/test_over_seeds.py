"""Experiments over seeds: claims on means, and those on distillation name what is measured."""
import json

import pytest

import lean_jax as lean
from lean_jax.experiments import distillation
from lean_jax.pipeline import on_text


@pytest.mark.parametrize(('bound', 'passes'), [(1., True), (.6, False)])
def test_a_claim_is_on_the_mean_over_the_seeds(tiny_model, tmp_path, capsys, bound, passes):
  lean.save(tiny_model, tmp_path / 'model')
  (tmp_path / 'text.jsonl').write_text(
      ''.join(json.dumps(dict(text=f'the quick brown fox {n} jumps')) + '\n' for n in range(300)))
  seen = []

  def measured(model, train, test, seed, *, steps):
    seen.append((seed, steps, train.fingerprint != test.fingerprint))
    return {'one': dict(loss=float(seed)), 'other': dict(loss=1.5)}
  code = on_text.over_seeds(
      'An experiment.', measured,
      [dict(name='less', left='one.loss', right='other.loss', bound=bound)],
      [str(tmp_path / 'model'), '--data', str(tmp_path / 'text.jsonl'), '--window', '16'],
      steps=dict(type=int, default=7))
  assert seen == [(seed, 7, True) for seed in range(3)]
  last = capsys.readouterr().out.splitlines()[-1]
  assert code == 1 - passes and last.startswith('pass  less' if passes else 'FAIL  less')
  assert f'one.loss 1 (0 to 2) < {bound} x other.loss 1.5' in last


def test_every_claim_on_distillation_is_on_a_student_that_is_trained():
  trained = {*distillation.VARIANTS, 'hard', 'sequence'}
  for claim in distillation.claims():
    for side in ('left', 'right'):
      name, figure = claim[side].split('.')
      assert name in trained and figure in ('perplexity', 'own_text', 'rouge_l')
