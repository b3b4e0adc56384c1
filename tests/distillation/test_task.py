"""Task distillation: classifiers of texts and of words learn from a generator or a classifier."""
import json

import jax
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.distillation.labelling import log_likelihoods
from lean_jax.tree import named_arrays

BERT = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=64)
LABELS = {'fox': ' fox', 'dog': ' lazy dog'}
PROMPT = 'the {text} over'
TEXTS = ['quick', 'brown', 'the lazy', 'fox jumps', 'jumps', 'dog'] * 3
GOOD, BAD = ('fox', 'quick', 'brown'), ('dog', 'lazy', 'over')


@pytest.fixture(scope='module')
def classifier(tiny_model):
  return lean.add_classifier(lean.create('bert', tiny_model.tokenizer, **BERT), ['bad', 'good'])


@pytest.fixture(scope='module')
def tagger(tiny_model):
  encoder = lean.create('bert', tiny_model.tokenizer, **BERT)
  return lean.add_classifier(encoder, ['bad', 'good'], of='token')


def sentences(count, seed):
  """Texts of good or of bad words, and which."""
  draw, out = np.random.default_rng(seed), []
  for k in range(count):
    words = draw.choice(GOOD if k % 2 else BAD, 3)
    out.append(dict(text=' '.join(words), label='good' if k % 2 else 'bad'))
  return out


def test_a_score_is_the_log_probability_of_the_labels_tokens(tiny_model):
  rows = lean.label(tiny_model, TEXTS[:4], LABELS, prompt=PROMPT)
  for row in rows:
    for name, string in LABELS.items():
      context, whole = (tiny_model.tokenizer.encode(t, special=True) for t in (
          PROMPT.replace('{text}', row['text']), PROMPT.replace('{text}', row['text']) + string))
      logits = np.asarray(tiny_model.logits(whole[None])[0], np.float64)
      log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
      want = sum(log_p[t - 1, whole[t]] for t in range(len(context), len(whole)))
      assert row['scores'][name] == pytest.approx(want, abs=1e-4)
    assert row['label'] == max(row['scores'], key=row['scores'].get)


def test_words_are_labelled_each_by_a_prompt_of_its_own(tiny_model):
  row, = lean.label(tiny_model, [['quick', 'fox']], LABELS, prompt='{text} the {word}')
  want = log_likelihoods(tiny_model, ['quick fox the quick', 'quick fox the fox'],
                         list(LABELS.values()))
  np.testing.assert_allclose([[s[n] for n in LABELS] for s in row['scores']], want, rtol=1e-6)


def test_labelling_goes_on_from_where_it_was_killed(tiny_model, tmp_path, monkeypatch):
  monkeypatch.setattr('lean_jax.distillation.labelling.EVERY', 4)
  ask = lambda path, prompt=PROMPT: lean.label(tiny_model, TEXTS, LABELS, prompt=prompt, out=path)
  want = ask(tmp_path / 'whole.jsonl')
  lines = (tmp_path / 'whole.jsonl').read_bytes().splitlines(keepends=True)
  assert len(lines) == len(TEXTS) + 1
  (tmp_path / 'cut.jsonl').write_bytes(b''.join(lines[:8]) + lines[8][:9])
  seen = []
  real = log_likelihoods
  monkeypatch.setattr('lean_jax.distillation.labelling.log_likelihoods',
                      lambda m, contexts, *a: seen.extend(contexts) or real(m, contexts, *a))
  found = ask(tmp_path / 'cut.jsonl')
  assert [(row['text'], row['label']) for row in found] == [(r['text'], r['label']) for r in want]
  for row, other in zip(found, want):                       # other batches, other last digits
    assert row['scores'] == pytest.approx(other['scores'], rel=1e-5)
  assert len(seen) == len(TEXTS) - 7
  assert (tmp_path / 'cut.jsonl').read_bytes().startswith(b''.join(lines[:8]))
  assert ask(tmp_path / 'cut.jsonl') == found
  with pytest.raises(lean.InputError, match='name another file'):
    ask(tmp_path / 'cut.jsonl', prompt='a {text}')


@pytest.mark.parametrize(('texts', 'labels', 'prompt', 'message'), [
    ([], LABELS, PROMPT, 'no texts'), (['a', ['b']], LABELS, PROMPT, 'alike'),
    (['a'], LABELS, 'nothing', 'expected {text}'), (['a'], LABELS, '{text} {word}', 'lists of w'),
    ([['a']], LABELS, '{text}', 'and {word}'), (['a'], [' fox'], PROMPT, 'two or more'),
    (['a'], dict(x='', y=' a'), PROMPT, 'adds no token'),
    (['over ' * 70], LABELS, PROMPT, 'shorten the text')])
def test_what_cannot_be_labelled_is_refused(tiny_model, texts, labels, prompt, message):
  with pytest.raises(lean.InputError, match=message):
    lean.label(tiny_model, texts, labels, prompt=prompt)


def test_a_classifier_learns_hard_labels_and_another_learns_its_classes(classifier, tiny_model,
                                                                        tmp_path):
  train, test = sentences(64, 0), sentences(32, 1)
  assert lean.evaluate_classifier(classifier, test)['accuracy'] < .8
  teacher = lean.train_classifier(classifier, train, steps=40, batch=16, peak=3e-3)
  assert lean.evaluate_classifier(teacher, test)['accuracy'] == 1
  fresh = lean.create(classifier, seed=5, hidden_size=16)
  (tmp_path / 'rows.jsonl').write_text('\n'.join(
      json.dumps(dict(text=row['text'])) for row in train))
  student = lean.train_classifier(fresh, tmp_path / 'rows.jsonl', teacher=teacher, temperature=2.,
                                  steps=40, batch=16, peak=3e-3)
  assert lean.evaluate_classifier(student, test)['accuracy'] == 1
  texts = [row['text'] for row in test]
  margin = lambda model: np.diff(model.classify(texts))
  far = lambda model: np.abs(margin(model) - margin(teacher)).mean()
  assert far(student) < .5 * far(fresh)
  lean.save(student, tmp_path / 'out')
  np.testing.assert_array_equal(lean.load(tmp_path / 'out').classify(texts),
                                student.classify(texts))


@pytest.mark.slow
def test_a_generators_scores_are_what_a_classifier_learns(tiny_model):
  rows = lean.label(tiny_model, TEXTS, LABELS, prompt=PROMPT)
  encoder = lean.create('bert', tiny_model.tokenizer, **BERT)
  student = lean.add_classifier(encoder, list(LABELS))
  learned = lean.train_classifier(student, rows, steps=60, batch=18, peak=3e-3, soft_weight=1.,
                                  temperature=8.)
  scores = np.array([[row['scores'][n] for n in LABELS] for row in rows])
  soft = lambda x: np.asarray(jax.nn.softmax(x / 8))
  assert np.abs(soft(student.classify(TEXTS)) - soft(scores)).max() > .2
  np.testing.assert_allclose(soft(learned.classify(TEXTS)), soft(scores), atol=.05)


@pytest.mark.slow
def test_a_tagger_learns_words_and_another_learns_its_classes(tagger):
  draw = np.random.default_rng(0)
  rows = []
  for _ in range(48):
    words = [str(w) for w in draw.choice(GOOD + BAD, draw.integers(1, 6))]
    rows.append(dict(words=words, label=['good' if w in GOOD else 'bad' for w in words]))
  teacher = lean.train_classifier(tagger, rows, steps=40, batch=16, peak=3e-3,
                                  group_by_length=True)
  assert lean.evaluate_classifier(teacher, rows)['accuracy'] > .97
  bare = [dict(words=row['words']) for row in rows]
  student = lean.train_classifier(lean.create(tagger, seed=7), bare, teacher=teacher, steps=60,
                                  batch=16, peak=3e-3)
  assert lean.evaluate_classifier(student, rows)['accuracy'] > .97
  assert [len(x) for x in student.tag([row['words'] for row in rows[:3]])] == [
      len(row['words']) for row in rows[:3]]


def test_padding_specials_and_later_tokens_of_a_word_have_no_say(tagger):
  from lean_jax.data import labelled
  from lean_jax.distillation.classes import classes
  rows = [dict(words=['jumpsoverfox', 'dog'], label=['good', 'bad'],
               scores=[dict(good=1., bad=0.)] * 2), dict(words=['fox'])]
  encoded = tagger.tokenizer.words([row['words'] for row in rows])
  assert len(encoded[0][0]) > 4 and encoded[0][2][1] > encoded[0][2][0] + 1
  batches = labelled.batches(encoded, *labelled.targets(rows, tagger.labels, True), batch=2, seed=0,
                             context=64)
  batch = batches[0]
  assert (batch['labels'] >= 0).sum() == batch['scored'].sum() == 2
  loss = classes(tagger.module, 2., .5)
  value, _ = loss(tagger.params, batch, None)
  at = batch['scored'][..., None] > 0
  other = dict(batch, scores=np.where(at, batch['scores'], 9.).astype(np.float32))
  assert loss(tagger.params, other, None)[0] == value


def test_the_loss_is_the_closed_form_in_float64(classifier):
  from lean_jax.data import labelled
  from lean_jax.distillation.classes import classes
  rows = [dict(text=row['text'], label=row['label'], scores=dict(good=1.5 * k, bad=-.5))
          for k, row in enumerate(sentences(4, 3))]
  rows[1] = dict(text=rows[1]['text'], label='good')                      # no scores
  rows[2] = dict(text=rows[2]['text'], scores=rows[2]['scores'])          # no label
  encoded = classifier.tokenizer.rows([row['text'] for row in rows])
  batch = labelled.batches(encoded, *labelled.targets(rows, classifier.labels, False), batch=4,
                           seed=0, context=64).make(np.arange(4))
  found, _ = classes(classifier.module, 2., .3)(classifier.params, batch, None)
  logits = classifier.classify([row['text'] for row in rows]).astype(np.float64)
  log = lambda x: x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
  wanted = dict(bad=0, good=1)
  hard = -np.mean([log(logits[k])[wanted[rows[k]['label']]] for k in (0, 1, 3)])
  p = log(np.array([[rows[k]['scores'][n] for n in ('bad', 'good')] for k in (0, 2, 3)]) / 2)
  soft = 4 * np.mean(np.sum(np.exp(p) * (p - log(logits[[0, 2, 3]] / 2)), axis=1))
  assert float(found) == pytest.approx(.3 * soft + .7 * hard, rel=1e-5)


@pytest.mark.parametrize(('method', 'settings'), [
    ('pfeiffer', dict(rank=4)), ('lora', dict(rank=2, alpha=4., where='layers/.*|classifier/.*'))])
def test_with_adapters_the_head_trains_and_the_encoder_does_not(classifier, method, settings):
  adapted = lean.attach(classifier, method, **settings)
  learned = lean.train_classifier(adapted, sentences(16, 0), steps=1, batch=8, peak=1e-2)
  before, after = (named_arrays(model.params) for model in (adapted, learned))
  changed = {name for name, x in after.items() if bool((x != before[name]).any())}
  head = {name for name in before if name.startswith(('classifier/', 'transform/'))
          and '/base/' not in name and not name.endswith(('/a', '/b'))}
  assert head and head <= changed
  own = ('up', 'down', 'up_bias', 'down_bias') if method == 'pfeiffer' else ('a', 'b')
  assert all(name.split('/')[-1] in own for name in changed - head) and changed - head


def test_a_new_head_leaves_the_encoder_as_it_was(tiny_model):
  encoder = lean.create('bert', tiny_model.tokenizer, **BERT)
  made = lean.add_classifier(encoder, ['a', 'b', 'c'])
  assert made.classify(['fox']).shape == (1, 3) and made.labels == ('a', 'b', 'c')
  np.testing.assert_array_equal(made.embed(['the fox']), encoder.embed(['the fox']))
  np.testing.assert_array_equal(made.params['transform']['dense']['kernel'].value,
                                encoder.params['transform']['dense']['kernel'].value)


@pytest.mark.parametrize(('rows', 'settings', 'message'), [
    ([], {}, 'no rows'), ([dict(txt='a')], {}, 'expected dict'),
    ([dict(text='a')] * 4, {}, 'no row has a label or scores'),
    ([dict(words=['a'])] * 4, {}, "expected 'text'"),
    ([dict(text='a', label='odd')] * 4, {}, "label 'odd'; the model has: bad, good"),
    ([dict(text='a', scores=dict(bad=1.))] * 4, {}, 'a number for each of: bad, good'),
    ([dict(text='a', label='bad')] * 4, dict(soft_weight=.5), 'soft_weight 0.5'),
    ([dict(text='a', label='bad')] * 4, dict(temperature=0.), 'temperature 0.0'),
    ([dict(text='a', label='bad')] * 2, {}, 'a batch of 4 of 2 rows')])
def test_rows_that_teach_nothing_are_refused(classifier, rows, settings, message):
  with pytest.raises(lean.InputError, match=message):
    lean.train_classifier(classifier, rows, steps=1, batch=4, **settings)


def test_models_without_a_fitting_head_are_refused(tiny_model, classifier, tagger):
  with pytest.raises(lean.InputError, match='no head of classes'):
    lean.train_classifier(tiny_model, sentences(4, 0), steps=1)
  with pytest.raises(lean.InputError, match='no encoder'):
    lean.add_classifier(tiny_model, ['a'])
  with pytest.raises(lean.InputError, match='each once'):
    lean.add_classifier(classifier, ['a', 'a'])
  with pytest.raises(lean.InputError, match="head of 'text'"):
    lean.add_classifier(classifier, ['a'], of='text')
  other = lean.add_classifier(classifier, ['yes', 'no'])
  with pytest.raises(lean.InputError, match='the teacher has labels yes, no'):
    lean.train_classifier(classifier, sentences(4, 0), teacher=other, steps=1, batch=2)
  with pytest.raises(lean.InputError, match='words no classes'):
    classifier.tag([['a']])
  with pytest.raises(lean.InputError, match='give lists of words'):
    tagger.tag(['a text'])
