"""Different tokenizers: ULD by positions and by spans, against float64, and trained by distill."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.data.tokenizer import train_bpe
from lean_jax.distillation import uld as module
from lean_jax.distillation.losses import parsed, weighted
from lean_jax.distillation.uld import reading, uld
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.objectives.forward import forward
from lean_jax.training import mesh as meshes

DRAW = np.random.default_rng(0)
V, W = 11, 7
# Two texts of a student (BOS first) and a teacher (no BOS), and the span of each token.
SPANS = np.array([[-1, 0, 1, 1, 2, 3, 3, 3, 4], [-1, 0, 1, 2, 2, -1, -1, -1, -1]])
OTHER = np.array([[0, 0, 1, 2, 2, 3, 4], [0, 1, 2, 2, -1, -1, -1]])
MASK, OTHER_MASK = SPANS >= -1, OTHER >= 0
MASK[1, 5:] = False
TOKENS, OTHERS = DRAW.integers(0, V, SPANS.shape), DRAW.integers(0, W, OTHER.shape)
Y, Z = DRAW.normal(size=(*SPANS.shape, V)) * 2, DRAW.normal(size=(*OTHER.shape, W)) * 2


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def distance64(q, p):
  q, p = np.sort(q)[::-1], np.sort(p)[::-1]
  n = max(len(q), len(p))
  return np.abs(np.pad(q, (0, n - len(q))) - np.pad(p, (0, n - len(p)))).sum()


def positions64(temperature):
  """Token j of the text against token j: what predicts each, position by position."""
  out = []
  for b in range(2):
    mine, theirs = (list(np.flatnonzero(s[b] >= 0)) for s in (SPANS, OTHER))
    out += [distance64(softmax(Y[b, s - 1] / temperature), softmax(Z[b, t - 1] / temperature))
            for s, t in zip(mine, theirs) if s > 0 and t > 0]
  return np.mean(out)


def merged64(y, tokens, group, temperature):
  """P(. | before) at the group's first token, times P of each of its other tokens."""
  first, *others = group
  p = softmax(y[first - 1] / temperature)
  for t in others:
    p = p * softmax(y[t - 1] / temperature)[tokens[t]]
  return p


def spans64(temperature):
  out = []
  for b in range(2):
    for k in range(SPANS[b].max() + 1):
      mine, theirs = np.flatnonzero(SPANS[b] == k), np.flatnonzero(OTHER[b] == k)
      if mine[0] > 0 and theirs[0] > 0:                # else nothing predicts its first token
        out.append(distance64(merged64(Y[b], TOKENS[b], mine, temperature),
                              merged64(Z[b], OTHERS[b], theirs, temperature)))
  return np.mean(out)


def ours(y, z, align, temperature):
  read = lambda y, tokens, spans: reading(
      y, lambda rows: rows, dict(tokens=jnp.asarray(tokens), spans=jnp.asarray(spans)), None, align)
  return uld(read(y, TOKENS, SPANS), read(z, OTHERS, OTHER), temperature)


@pytest.fixture(scope='module')
def found():
  """(value, gradients) by spans at a temperature."""
  y, z = jnp.asarray(Y, jnp.float32), jnp.asarray(Z, jnp.float32)
  run = jax.jit(jax.value_and_grad(lambda y, z, t: ours(y, z, 'spans', t), (0, 1)))
  return {t: run(y, z, t) for t in (1., 2.)}


@pytest.mark.parametrize('temperature', [2.])
def test_by_positions_it_is_the_papers_formula(temperature):
  y, z = jnp.asarray(Y, jnp.float32), jnp.asarray(Z, jnp.float32)
  got = jax.jit(lambda y, z: ours(y, z, 'positions', temperature))(y, z)
  np.testing.assert_allclose(got, positions64(temperature), rtol=1e-5)


@pytest.mark.parametrize('temperature', [1., 2.])
def test_by_spans_it_is_that_of_merged_probabilities(found, temperature):
  value, (dy, dz) = found[temperature]
  np.testing.assert_allclose(value, spans64(temperature), rtol=1e-5)
  assert np.abs(dy).sum() > 0 and not np.any(dz)


def test_the_gradient_is_that_of_float64(found):
  _, (grad, _) = found[1.]
  for at in ((0, 0, 3), (0, 3, 5), (0, 6, int(TOKENS[0, 7])), (1, 2, 1), (1, 3, 0), (1, 6, 2)):
    each = []
    for step in (1e-5, -1e-5):
      Y[at] += step
      each.append(spans64(1.))
      Y[at] -= step
    np.testing.assert_allclose(grad[at], (each[0] - each[1]) / 2e-5, atol=1e-6)


def test_some_places_at_a_time_are_the_same(found, monkeypatch):
  monkeypatch.setattr(module, 'ENTRIES', 3 * 2 * V)          # three
  y, z = jnp.asarray(Y, jnp.float32), jnp.asarray(Z, jnp.float32)
  value, grad = jax.jit(jax.value_and_grad(lambda y: ours(y, z, 'spans', 1.)))(y)
  np.testing.assert_allclose(value, found[1.][0], rtol=1e-6)
  np.testing.assert_allclose(grad, found[1.][1][0], atol=1e-7)


STUDENT = DecoderConfig(vocabulary=V, width=16, layers=1, heads=2, groups=1, head_width=8,
                        hidden=16, context=16)
TEACHER = dataclasses.replace(STUDENT, vocabulary=W, width=24, tied=False)
PAIRED = dict(tokens=TOKENS, mask=MASK, spans=SPANS, teacher_tokens=OTHERS,
              teacher_mask=OTHER_MASK, teacher_spans=OTHER)


def fresh(config, seed):
  tokens = jnp.zeros((1, 4), jnp.int32)
  return jax.jit(config.module.init)(jax.random.key(seed), tokens)['params']


@pytest.mark.parametrize('head_bias', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_in_a_list_of_losses_each_model_reads_its_own_tokens(head_bias):
  student = dataclasses.replace(STUDENT, head_bias=head_bias)      # a bias: by all logits
  batch = jax.tree.map(jnp.asarray, PAIRED)
  losses = [dict(kind='uld', align='spans', temperature=2., weight=.5), dict(kind='cross_entropy')]
  loss = weighted(student.module, TEACHER.module, parsed(student, TEACHER, losses))
  params, known = fresh(student, 0), fresh(TEACHER, 1)

  @jax.jit
  def both(p, t):
    y = forward(student.module, p, dict(tokens=batch['tokens'], mask=batch['mask']))[0]
    z = forward(TEACHER.module, t, dict(tokens=batch['teacher_tokens'],
                                        mask=batch['teacher_mask']))[0]
    return loss(p, batch, None, teacher_params=t), ours(y, z, 'spans', 2.)
  (total, values), want = both(params, known)
  np.testing.assert_allclose(values['uld'], want, rtol=1e-5)
  np.testing.assert_allclose(total, .5 * values['uld'] + values['cross_entropy'], rtol=1e-5)
  odd = weighted(student.module, TEACHER.module, parsed(student, TEACHER, [dict(kind='hidden')]))
  with pytest.raises(InputError, match='hidden compares token by token.*uld'):
    odd({**params, 'projections': {}}, batch, None, teacher_params=known)


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same_loss():
  batch = {k: np.concatenate([x, x[::-1]]) for k, x in PAIRED.items()}
  loss = weighted(STUDENT.module, TEACHER.module, parsed(
      STUDENT, TEACHER, [dict(kind='uld', align='spans')]))
  of = lambda p, t, batch: loss(p, batch, None, teacher_params=t)[0]
  models = fresh(STUDENT, 0), fresh(TEACHER, 1)
  want, grads = jax.jit(jax.value_and_grad(of))(*models, jax.tree.map(jnp.asarray, batch))
  mesh = meshes.make_mesh(2, 2, 2)
  put = lambda t: jax.device_put(t, meshes.shardings(t, mesh))
  with meshes.on(mesh):
    value, ours = jax.jit(jax.value_and_grad(of))(*map(put, models), meshes.put_batch(batch, mesh))
  np.testing.assert_allclose(value, want, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, grads)


@pytest.mark.slow
def test_with_one_tokenizer_it_is_by_tokens():
  teacher = dataclasses.replace(STUDENT, width=24)
  batch = dict(tokens=jnp.asarray(TOKENS), mask=jnp.asarray(MASK))
  params, known = fresh(STUDENT, 0), fresh(teacher, 1)
  y, z = (jax.jit(lambda p, c=c: forward(c.module, p, batch)[0])(p) for c, p in (
      (STUDENT, params), (teacher, known)))
  want = np.mean([distance64(softmax(y[b, t]), softmax(z[b, t])) for b, n in ((0, 9), (1, 5))
                  for t in range(n - 1)])
  for align in ('positions', 'spans'):
    loss = weighted(STUDENT.module, teacher.module, parsed(
        STUDENT, teacher, [dict(kind='uld', align=align)]))
    value, _ = jax.jit(lambda p, t, loss=loss: loss(p, batch, None, teacher_params=t))(
        params, known)
    np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.fixture
def other_student(tiny_model):
  tokenizer = train_bpe(['the old dog sees no fox\n' * 20], 300)
  config = dataclasses.replace(tiny_model.config, vocabulary=tokenizer.size, width=16, layers=1)
  return dataclasses.replace(tiny_model, config=config, params={}, tokenizer=tokenizer)


@pytest.mark.slow
def test_distill_teaches_a_student_with_another_tokenizer(tiny_model, other_student, tmp_path):
  text = 'the old fox sees the lazy dog\n' * 8
  for k in range(6):
    (tmp_path / f'{k}.txt').write_text(text)
  student = dataclasses.replace(other_student, params=fresh(other_student.config, 0))
  learned = lean.distill(
      tiny_model, tmp_path, student=student, losses=[dict(kind='uld', align='spans')],
      steps=12, batch=4, window=24, peak=2e-2, decay='constant', workdir=tmp_path / 'run',
      log_every=1)
  rows = [json.loads(r)['uld'] for r in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
  assert rows[-1] < .95 * rows[0]
  assert learned.tokenizer is student.tokenizer and learned.config == student.config


def test_other_losses_and_other_teachers_are_refused(tiny_model, other_student):
  say = lambda losses, teacher=tiny_model, **own: lean.distill(
      teacher, 'text', student=other_student, losses=losses, steps=1, **own)
  for losses in (None, [dict(kind='uld'), dict(kind='reverse_kl')], [dict(kind='cka')]):
    with pytest.raises(InputError, match=r"token by token.*kind='uld'"):
      say(losses)
  with pytest.raises(InputError, match='on_policy 0.5; expected dict'):
    say([dict(kind='uld')], on_policy=.5)
  with pytest.raises(InputError, match='leave on_policy out'):
    say([dict(kind='uld')], on_policy=dict(tokens=4))
  with pytest.raises(InputError, match='teachers of 2 tokenizers'):
    say([dict(kind='uld')], [tiny_model, other_student])


@pytest.mark.parametrize(('given', 'says'), [
    (dict(align='words'), "align 'words'.*positions, spans"), (dict(temperature=0.), 'temperature'),
    (dict(beta=1.), "no 'beta'"), (dict(teacher=1), 'teacher 1')])
def test_what_cannot_be_is_refused(given, says):
  with pytest.raises(InputError, match=says):
    parsed(STUDENT, TEACHER, [dict(kind='uld', **given)])


def test_other_losses_on_vocabularies_that_differ_name_it():
  with pytest.raises(InputError, match='7.*11.*uld does not'):
    parsed(STUDENT, TEACHER, [dict(kind='forward_kl')])
