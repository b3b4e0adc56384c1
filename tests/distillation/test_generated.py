"""Data that a teacher writes: what is kept, the same bytes after any end, and training on it."""
import json
import re
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.data.batches import Batches
from lean_jax.distillation import generated
from lean_jax.distillation.answers import final_number, gsm8k
from lean_jax.distillation.completions import completions
from lean_jax.distillation.duplicates import ALIKE, Seen
from lean_jax.distillation.generated import repetition, write_data
from lean_jax.errors import InputError

PROMPTS = ['the quick', 'a lazy dog', 'fox', 'over the']
WORDS = [f'{a}{b}' for a in ('one', 'two', 'ten') for b in ('', 'th', 'fold', 'some', 'ness')]


def lines(path):
  return [json.loads(x) for x in path.read_bytes().splitlines()]


@pytest.fixture
def stub(monkeypatch):
  """Generation that is made of words by the seed and the prompts, without a model."""
  def write(model, prompts, *, tokens, n, seed, **_):
    draw = np.random.default_rng([seed, len(prompts)])
    counts = draw.integers(1, tokens + 1, (len(prompts), n)).tolist()
    texts = [[' '.join(draw.choice(WORDS[:2], c)) for c in row] for row in counts]
    return types.SimpleNamespace(texts=texts, counts=counts)
  monkeypatch.setattr(generated, 'write', write)
  return write


def test_what_a_teacher_writes_is_what_it_generates(tiny_model, tmp_path):
  out = tmp_path / 'data.jsonl'
  report = lean.write_data(tiny_model, PROMPTS[:3], out, tokens=8, n=3, batch=2, finished=False,
                           most_repetition=1.)
  found = lines(out)
  assert report['samples'] == 9 and report['kept'] == len(found) == 9
  assert report['acceptance'] is None and report['answered'] == 1
  first = generated.write(tiny_model, PROMPTS[:2], tokens=8, temperature=1., n=3,
                          seed=generated._seed(0, 0))
  assert [x['completion'] for x in found[:6]] == [t for texts in first.texts for t in texts]
  assert [(x['prompt'], x['index'], x['sample']) for x in found] == [
      (p, k, s) for k, p in enumerate(PROMPTS[:3]) for s in range(3)]
  assert generated._seed(0, 0) != generated._seed(0, 2) != generated._seed(1, 2)


def test_each_reason_leaves_out_what_it_says(tiny_model, tmp_path, monkeypatch):
  texts = {'unfinished': ('a b c', 9), 'short': ('a', 1), 'empty': (' ', 3),
           'long': ('a b c d e', 8), 'repetitive': ('a b c d ' * 4, 5), 'filtered': ('bad', 3),
           'kept': ('a fine text', 3), 'same': ('A fine, text.', 3)}
  monkeypatch.setattr(generated, 'write', lambda *_, **__: types.SimpleNamespace(
      texts=[[t for t, _ in texts.values()]], counts=[[c for _, c in texts.values()]]))
  report = write_data(tiny_model, ['p'], tmp_path / 'a', n=8, tokens=9, least=2, most=7,
                      keep=lambda text: 'bad' not in text)
  assert {k: report[k] for k in generated.REASONS} == dict(
      unfinished=1, short=2, long=1, repetitive=1, filtered=1, wrong=0, same=1, alike=0)
  assert [x['completion'] for x in lines(tmp_path / 'a')] == ['a fine text']


def test_samples_that_reach_the_answer_are_kept(tiny_model, tmp_path, monkeypatch):
  worked = [['so 2+3 is 5\n#### 5', 'it is\n#### 6', 'so 2 and 3 make 5\n#### 5.0'],
            ['no answer', '#### 1', '#### 2']]
  monkeypatch.setattr(generated, 'write', lambda *_, **__: types.SimpleNamespace(
      texts=worked, counts=[[5] * 3] * 2))
  rows = [dict(question='2+3?', answer='2+3=5\n#### 5'), dict(question='x', answer='#### 1,200')]
  report = write_data(tiny_model, rows, tmp_path / 'a', n=3, field='question', answer='gsm8k')
  assert [x['completion'] for x in lines(tmp_path / 'a')] == [worked[0][0], worked[0][2]]
  assert (report['acceptance'], report['answered'], report['wrong']) == (2 / 6, .5, 4)


def test_killed_anywhere_it_ends_with_the_same_bytes(tiny_model, tmp_path, stub, monkeypatch):
  rows = PROMPTS * 2
  run = lambda out: write_data(tiny_model, rows, out, tokens=12, n=4, batch=3, most_repetition=.9)
  whole = tmp_path / 'whole'
  report = run(whole)
  assert 0 < report['kept'] < report['samples']
  real, at = generated._Log._append, [0]

  def dying(self, path, data):
    at[0] -= 1
    if at[0] < 0:
      real(self, path, data[:len(data) * at[1] // 4])            # a part of it, or all, or none
      raise KeyboardInterrupt
    real(self, path, data)
  monkeypatch.setattr(generated._Log, '_append', dying)
  for kill in range(6):                                    # of three batches, two writes of each
    for part in range(5):
      out, at[:] = tmp_path / f'{kill}-{part}', [kill, part]
      with pytest.raises(KeyboardInterrupt):
        run(out)
      at[:] = [99, 0]
      assert run(out) == report
      assert out.read_bytes() == whole.read_bytes()
      assert (out.with_name(f'{out.name}.progress').read_bytes()
              == (tmp_path / 'whole.progress').read_bytes())


CHILD = """
import sys
import lean_jax as lean
model = lean.load(sys.argv[1])
lean.write_data(model, sys.argv[3:], sys.argv[2], tokens=12, n=4, batch=1, finished=False,
                most_repetition=1.)
"""


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_nothing(tiny_model, tmp_path):
  lean.save(tiny_model, tmp_path / 'model')
  prompts = [f'the {word} fox' for word in WORDS]
  run = lambda out: [sys.executable, '-c', CHILD, tmp_path / 'model', tmp_path / out, *prompts]
  subprocess.run(run('whole'), check=True)
  killed = 0
  for wait in np.random.default_rng(0).uniform(0, .3, 5):
    child = subprocess.Popen(run('a'))
    while not (tmp_path / 'a.progress').exists() and child.poll() is None:
      time.sleep(.01)
    time.sleep(wait + 2.)
    child.kill()
    killed += child.wait() < 0
  assert killed
  subprocess.run(run('a'), check=True)
  for end in ('', '.progress'):
    assert (tmp_path / f'a{end}').read_bytes() == (tmp_path / f'whole{end}').read_bytes()


def test_files_of_other_calls_and_changed_ones_are_refused(tiny_model, tmp_path, stub):
  out = tmp_path / 'a'
  run = lambda prompts=PROMPTS, **how: write_data(
      tiny_model, prompts, **dict(out=out, tokens=12, n=4, batch=2) | how)
  run()
  for how, says in ((dict(seed=1), r'another seed \(0, now 1\)'), (dict(prompts=['x']), 'prompts'),
                    (dict(keep=lambda text: True), 'keep'), (dict(top_k=3), 'top_k')):
    with pytest.raises(InputError, match=f'a was written with another {says}|{says}'):
      run(**how)
  data = out.read_bytes()
  out.write_bytes(data.replace(b'one', b'two', 1))
  with pytest.raises(InputError, match='was changed since'):
    run()
  (tmp_path / 'b').write_text('mine')
  with pytest.raises(InputError, match='b is there'):
    run(out=tmp_path / 'b')
  assert (tmp_path / 'b').read_text() == 'mine'
  (tmp_path / 'c.progress').write_text('')
  with pytest.raises(InputError, match='c.progress is not what'):
    run(out=tmp_path / 'c')


@pytest.mark.parametrize(('how', 'says'), [
    (dict(prompts=[]), 'no prompts'),
    (dict(prompts=[dict(q='x')]), "no 'prompt'; choose one of: 'q'"),
    (dict(n=0), 'n 0'), (dict(batch=0), 'batch 0'), (dict(most_repetition=2), 'most_repetition 2'),
    (dict(least=5, most=4), 'at least 5'), (dict(answer='x'), "answer 'x'; give gsm8k"),
    (dict(answer='gsm8k'), "prompt 0 has no 'answer'"), (dict(temperature=-1.), 'temperature'),
    (dict(n=2, temperature=0.), 'n'),
    (dict(prompts=['a', 'x' * 60, 'y' * 99]), 'prompt 1 has 61 tokens.*nor do 1 others'),
    (dict(prompts=['']), 'empty prompt'),
    (dict(prompts=[dict(prompt='a', odd={1})]), 'more than texts, numbers'),
    (dict(prompts=[3]), 'a prompt of int')])
def test_what_cannot_be_written_is_refused(tiny_model, tmp_path, how, says):
  with pytest.raises(InputError, match=says):
    write_data(tiny_model, **dict(prompts=PROMPTS, out=tmp_path / 'a', tokens=8) | how)


def test_duplicates_are_those_of_their_definition():
  draw = np.random.default_rng(0)
  seen, kept = Seen(), []
  shingles = lambda t: {tuple(t.split()[k:k + 5]) for k in range(max(1, len(t.split()) - 4))}
  texts = []
  for _ in range(30):
    words = draw.choice(WORDS, 40)
    for changed in (0, 1, 2, 6, 20):
      other = words.copy()
      other[draw.integers(0, 40, changed)] = 'changed'
      texts.append(' '.join(other))
  counts = dict.fromkeys((None, 'same', 'alike'), 0)
  for text in [*texts, *texts[:5]]:
    found = seen.add('p', text.capitalize() + '.')
    counts[found] += 1
    alike = max([len(shingles(text) & s) / len(shingles(text) | s) for _, s in kept], default=0)
    assert (found is None) == (alike < ALIKE), text
    if found is None:
      kept.append((text, shingles(text)))
  assert min(counts.values()) > 2
  assert seen.add('another prompt', texts[0]) is None


def test_repetition_is_the_part_of_grams_that_came_before():
  assert repetition('a b c d e f') == repetition('a b') == repetition('') == 0
  assert repetition('a b c d a b c d') == pytest.approx(1 / 5)
  assert repetition('no ' * 13) == pytest.approx(.9)


@pytest.mark.parametrize(('text', 'number'), [
    ('#### 72', '72'), ('#### $1,200.50 a month', '1200.5'), ('#### -3', '-3'), ('#### $-3', '-3'),
    ('####18 eggs', '18'), ('#### 1\n#### 2.0', '2'), ('#### .50', '0.5'), ('#### 70%', '70'),
    ('####\n5\n6', '5'), ('#### 100', '100'), ('#### -0', '0'), ('72', None), ('#### none', None),
    ('#### \N{MINUS SIGN}4', '-4'), ('', None)])
def test_the_final_number_is_normalised(text, number):
  assert final_number(text) == number


def test_references_of_gsm8k_have_the_numbers_of_its_own_pattern(real_data):
  theirs = re.compile(r'#### (\-?[0-9\.\,]+)')                    # openai/grade-school-math
  rows = lines(real_data / 'gsm8k' / 'train.jsonl')
  for row in rows:
    assert float(final_number(row['answer'])) == float(
        theirs.search(row['answer']).group(1).replace(',', ''))
    assert gsm8k(row['answer'], row['answer']) and not gsm8k(row['question'], row['answer'])
  assert len(rows) == 4000
  with pytest.raises(InputError, match="no number after '####'"):
    gsm8k('#### 1', 'one')


ROWS = [dict(prompt='the quick', completion=' brown fox'),
        dict(prompt='a lazy', completion=' dog jumps over', finished=False)]


def test_completions_alone_are_labels(tiny_model):
  t = tiny_model.tokenizer
  data = completions(tiny_model, ROWS, length=32)
  batch = Batches(data, 2, 0, shuffle=False)[0]
  for row, given in enumerate(ROWS):
    labels, mask = batch['labels'][row], batch['mask'][row]
    ids = batch['tokens'][row][mask]
    learned = np.flatnonzero(labels >= 0)
    np.testing.assert_array_equal(learned, np.arange(learned[0], learned[-1] + 1))
    np.testing.assert_array_equal(labels[learned], batch['tokens'][row][learned + 1])
    ends = given.get('finished', True)
    assert t.decode(labels[learned]) == given['completion']
    assert (labels[learned][-1] == t.ends[0]) == ends
    assert learned[-1] == mask.sum() - 2
    assert t.decode(ids) == given['prompt'] + given['completion']
    np.testing.assert_array_equal(ids[:learned[0] + 1],
                                  lean.generation.text.encoded(tiny_model, given['prompt']))


def test_a_token_across_the_boundary_is_learned(tiny_model):
  given = dict(prompt='the qui', completion='ck brown')            # 'quick' is a token
  data = completions(tiny_model, [given])
  before = lean.generation.text.encoded(tiny_model, given['prompt'])
  begin = np.flatnonzero(data.labels[0] >= 0)[0] + 1
  assert begin < len(before)
  assert data.array[0, begin] != before[begin]


def test_gradients_come_from_completions_alone_and_rows_fill_up_to_no_effect(tiny_model):
  import jax

  from lean_jax.objectives.language_modeling import next_token
  loss = jax.jit(lambda p, b: next_token(tiny_model.module)(p, b, None)[0])
  short, long = (Batches(completions(tiny_model, ROWS, length=n), 2, 0, shuffle=False)[0]
                 for n in (24, 32))
  value = loss(tiny_model.params, short)
  np.testing.assert_allclose(loss(tiny_model.params, long), value, rtol=1e-5)
  y = tiny_model.logits(short['tokens'], short['mask'])
  nll = [-jax.nn.log_softmax(y[r, t])[short['labels'][r, t]]
         for r, t in zip(*np.nonzero(short['labels'] >= 0))]
  np.testing.assert_allclose(value, jnp.mean(jnp.stack(nll)), rtol=1e-5)


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_wrote(tiny_model, tmp_path):
  out = tmp_path / 'data.jsonl'
  lean.write_data(tiny_model, PROMPTS, out, tokens=16, n=4, temperature=.3, finished=False,
                  most_repetition=1.)
  data = lean.completions(tiny_model, out)
  for make in (lambda **how: lean.train(tiny_model, data, **how),
               lambda **how: lean.distill(tiny_model, data, keep=1, **how)):
    made = make(steps=20, batch=4, peak=1e-2, workdir=tmp_path / f'{make}', log_every=1)
    rows = lines(tmp_path / f'{make}' / 'metrics.jsonl')
    assert rows[-1]['loss'] < .8 * rows[0]['loss'] and made.config.vocabulary == 280


@pytest.mark.parametrize(('call', 'says'), [
    (lambda m: completions(m, [dict(prompt='a')]), "no 'prompt', or no text 'completion'"),
    (lambda m: completions(m, ROWS, length=3), 'none of 2 lines'),
    (lambda m: completions(m, ROWS, length=65), 'rows of 65 tokens'),
    (lambda m: lean.train(m, completions(m, ROWS), steps=1, window=8), 'completions with a window'),
    (lambda m: Batches(completions(m, ROWS), 3, 0), 'a batch of 3')])
def test_rows_that_cannot_be_are_refused(tiny_model, call, says):
  with pytest.raises(InputError, match=says):
    call(tiny_model)
