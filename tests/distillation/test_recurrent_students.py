"""Students of other architectures than their teacher: recurrent ones learn what it knows."""
import numpy as np
import pytest

import lean_jax as lean

WORDS = (('a small', 'the old', 'no'), ('fox', 'dog', 'cat', 'bird'),
         ('sees', 'jumps over', 'eats'), ('the lazy dog', 'a stone', 'its tail', 'nothing'))
STUDENTS = {
    'lean_lstm': dict(num_hidden_layers=1, lstm_size=48, max_position_embeddings=64),
    'mamba': dict(num_hidden_layers=1, state_size=8, max_position_embeddings=64),
    'mamba2': dict(num_hidden_layers=1, state_size=8, num_heads=4, head_dim=16, n_groups=1,
                   chunk_size=16, max_position_embeddings=64, tie_word_embeddings=True),
}


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  draw = np.random.default_rng(0)
  lines = [' '.join(draw.choice(part) for part in WORDS) for _ in range(1500)]
  path = tmp_path_factory.mktemp('text') / 'text.txt'
  path.write_text('\n'.join(lines))
  return path


@pytest.fixture(scope='module')
def teacher(tiny_model, text):
  return lean.train(tiny_model, text, steps=80, batch=8, window=32, peak=1e-2)


def student_of(teacher, family):
  """A fresh model of another family that reads as the teacher does."""
  return lean.create(family, teacher.tokenizer, seed=3, hidden_size=32, **STUDENTS[family])


@pytest.mark.parametrize('family', [
    'lean_lstm', 'mamba', pytest.param('mamba2', marks=pytest.mark.slow)])
def test_a_recurrent_student_learns_from_a_transformer(teacher, text, tmp_path, family):
  student = student_of(teacher, family)
  seen = []
  learned = lean.distill(teacher, text, student=student, steps=80, batch=8, window=32, peak=1e-2,
                         hooks=(lambda step, metrics: seen.append(
                             {k: float(metrics[k]) for k in ('loss', 'soft', 'hard')}),))
  for name in ('loss', 'soft', 'hard'):
    first, last = (np.mean([m[name] for m in part]) for part in (seen[:8], seen[-8:]))
    assert last < .6 * first, (name, first, last)
  before, after = (lean.evaluate(m, text, window=32)['nll'] for m in (student, learned))
  assert after < .5 * before, (before, after)
  lean.save(learned, tmp_path / 'out')
  again = lean.load(tmp_path / 'out')
  assert again.config == learned.config
  assert again.generate('the old fox', tokens=12) == learned.generate('the old fox', tokens=12)


@pytest.mark.parametrize('family', [
    'lean_lstm', pytest.param('mamba', marks=pytest.mark.slow)])
def test_a_recurrent_student_learns_a_transformers_states(teacher, text, family):
  student = lean.create(family, teacher.tokenizer, seed=3, hidden_size=24, **STUDENTS[family])
  seen = []
  learned = lean.distill(
      teacher, text, student=student, steps=24, batch=8, window=32, peak=1e-2,
      losses=[dict(kind='forward_kl'), dict(kind='cka'), dict(kind='hidden')],
      hooks=(lambda step, metrics: seen.append({k: float(v) for k, v in metrics.items()}),))
  for name in ('forward_kl', 'cka', 'hidden'):
    assert seen[-1][name] < .8 * seen[0][name], (name, seen[0][name], seen[-1][name])
  assert learned.params.keys() == student.params.keys()
  with pytest.raises(lean.InputError, match='has no attention'):
    lean.distill(teacher, text, student=student, steps=1, losses=[dict(kind='minilm')])


@pytest.mark.slow
def test_a_model_is_born_again_from_its_own_predictions(teacher, text):
  """Furlanello et al. 2018 (arXiv:1805.04770): the same architecture from a random start."""
  student = lean.create(teacher, seed=9)
  assert student.config == teacher.config and student.family == teacher.family
  learned = lean.distill(teacher, text, student=student, steps=40, batch=8, window=32, peak=1e-2)
  nll = lambda model: lean.evaluate(model, text, window=32)['nll']
  assert nll(learned) < .6 * nll(student)
