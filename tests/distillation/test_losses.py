"""Lists of losses: their sum, their values by name, schedules, what they learn, what is refused."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lean_jax as lean
from lean_jax import methods
from lean_jax.distillation import attention
from lean_jax.distillation.cka import cka
from lean_jax.distillation.hidden import hidden_cosine, hidden_mse
from lean_jax.distillation.losses import parsed, projections, tapped, weighted
from lean_jax.distillation.soft_labels import soft_labels
from lean_jax.distillation.terms import RELATIONS
from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.encoder import EncoderConfig
from lean_jax.nn.mamba import MambaOptions
from lean_jax.nn.taps import TAPS
from lean_jax.objectives.forward import forward, run, targets
from lean_jax.objectives.language_modeling import cross_entropy
from lean_jax.training import mesh as meshes
from lean_jax.training.loop import fit
from lean_jax.training.recipe import train
from lean_jax.weights import Dense

STUDENT = DecoderConfig(vocabulary=32, width=16, layers=1, heads=4, groups=2, head_width=4,
                        hidden=16, context=8)
TEACHER = dataclasses.replace(STUDENT, width=24, layers=2, head_width=6)
# The others are held to their definitions where the op is.
SOFT = dict(reverse_kl={}, jsd=dict(beta=.3), top_k=dict(k=5))
LABELS = [dict(kind=kind, weight=.1 * k, temperature=2., **options)
          for k, (kind, options) in enumerate(SOFT.items(), 1)] + [dict(kind='cross_entropy')]
LAYERS = [dict(kind='hidden', weight=.3), dict(kind='embedding', distance='cosine'),
          dict(kind='cka', layers='last'), dict(kind='attention', layers=[[0, 0]]),
          dict(kind='attention', name='probabilities', distance='kl', weight=2.),
          dict(kind='minilm', teacher_layer=0), dict(kind='minilmv2', relation_heads=2)]
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 8))
BATCH = dict(tokens=jnp.asarray(TOKENS), mask=jnp.ones((4, 8), bool).at[1, 5:].set(False))


def fresh(config, seed):
  return jax.jit(config.module.init)(jax.random.key(seed), TOKENS)['params']


def made(losses, student=STUDENT, teacher=TEACHER):
  """The loss, and what it learns."""
  terms = parsed(student, teacher, losses)
  modules = tuple(c.module for c in teacher) if isinstance(teacher, tuple) else teacher.module
  return weighted(student.module, modules, terms), projections(terms, jax.random.key(2))


@pytest.fixture(scope='module')
def models():
  return fresh(STUDENT, 0), fresh(TEACHER, 1)


def logits(models):
  """The student's and the teacher's, and the targets and their mask."""
  return *(jax.jit(lambda p, c=c: forward(c.module, p, BATCH)[0])(p)
           for c, p in zip((STUDENT, TEACHER), models)), *targets(BATCH)


@pytest.fixture(scope='module')
def whole(models):
  """The loss of all kinds, the student's parameters with what is learned, and of a batch the loss,
  its values, and its gradients for the student and the teacher.
  """
  loss, learned = made(LABELS + LAYERS)
  params = {**models[0], 'projections': learned}
  of = lambda p, t, batch: loss(p, batch, None, teacher_params=t)
  step = jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))
  (total, values), grads = step(params, models[1], BATCH)
  return loss, params, total, values, grads, step


def test_the_loss_is_the_weighted_sum_of_values_that_have_names(whole):
  _, _, total, values, *_ = whole
  weights = {x.get('name', x['kind']): x.get('weight', 1.) for x in LABELS + LAYERS}
  assert list(sorted(values)) == sorted(weights)
  np.testing.assert_allclose(total, sum(w * values[n] for n, w in weights.items()), rtol=1e-5)


def test_labels_are_those_of_all_logits(models, whole):
  y, target, wanted, mask = logits(models)
  for kind, options in SOFT.items():
    want = soft_labels(y, target, mask, temperature=2., kind=kind, **options)
    np.testing.assert_allclose(whole[3][kind], want, rtol=2e-5, err_msg=kind)
  np.testing.assert_allclose(whole[3]['cross_entropy'], cross_entropy(y, wanted, mask), rtol=1e-5)


@pytest.mark.slow
def test_a_head_in_codes_goes_through_all_logits_to_the_same_loss(models):
  untied = dataclasses.replace(TEACHER, tied=False)
  teacher = fresh(untied, 1)
  rounded = methods.apply(teacher, (dict(where='head/.*', method='rtn', spec='w8a16'),), None)
  head = rounded['head']['kernel']
  dense = {**rounded, 'head': dict(kernel=Dense(head.unbox(), 'io', head.axes))}
  losses = [dict(kind='reverse_kl', weight=.5), dict(kind='cross_entropy', weight=.25)]
  loss, _ = made(losses, teacher=untied)
  run = jax.jit(lambda teacher: loss(models[0], BATCH, None, teacher_params=teacher))
  (got, values), (near, _) = run(rounded), run(dense)
  np.testing.assert_allclose(got, .5 * values['reverse_kl'] + .25 * values['cross_entropy'],
                             rtol=1e-5)
  np.testing.assert_allclose(got, near, rtol=1e-5)


def test_losses_on_layers_are_those_of_the_taps(models, whole):
  one, other = (tapped(c, jax.jit(lambda p, c=c: run(c.module, p, BATCH, TAPS)[2])(p))
                for c, p in zip((STUDENT, TEACHER), models))
  (s,), (first, last) = one.layers, other.layers
  mask, learned = BATCH['mask'], whole[1]['projections']
  relation = lambda name, t, heads: attention.relation_kl(s[name], t[name], mask, heads)
  want = dict(
      hidden=hidden_mse(s['hidden'], last['hidden'], mask, learned['hidden']),
      embedding=hidden_cosine(one.embedding, other.embedding, mask, learned['embedding']),
      cka=cka(s['hidden'], last['hidden'], mask),
      attention=attention.attention_mse(s['scores'], first['scores'], mask),
      probabilities=attention.attention_kl(s['scores'], last['scores'], mask),
      minilm=attention.attention_kl(s['scores'], first['scores'], mask)
      + relation('values', first, 2),
      minilmv2=sum(relation(name, last, 2) for name in RELATIONS))
  for name, value in want.items():
    np.testing.assert_allclose(whole[3][name], value, rtol=1e-5, err_msg=name)


def test_no_gradient_reaches_the_teacher_and_one_reaches_what_is_learned(whole):
  ours, teachers = whole[4]
  assert not any(g.any() for g in jax.tree.leaves(teachers))
  assert sorted(ours['projections']) == ['embedding', 'hidden']
  assert all(g.any() for g in jax.tree.leaves(ours['projections']))
  assert ours['layers']['attention']['q']['kernel'].value.any()


def test_padding_counts_for_nothing(models, whole):
  _, params, total, values, _, step = whole
  other = dict(BATCH, tokens=BATCH['tokens'].at[1, 5:].set(3))
  (again, same), _ = step(params, models[1], other)
  np.testing.assert_allclose(again, total, rtol=1e-6)
  for name in values:
    np.testing.assert_allclose(same[name], values[name], rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_on_a_mesh_it_is_the_same_loss(models, whole):
  loss, params, total, _, (grads, _), _ = whole
  mesh = meshes.make_mesh(2, 2, 2)
  put = lambda t: jax.device_put(t, meshes.shardings(t, mesh))
  with meshes.on(mesh):
    step = jax.jit(jax.value_and_grad(
        lambda p, t, batch: loss(p, batch, None, teacher_params=t)[0]))
    got, ours = step(put(params), put(models[1]), meshes.put_batch(BATCH, mesh))
  np.testing.assert_allclose(got, total, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, grads)


def test_weights_and_temperatures_follow_the_step(models):
  fall = dict(kind='linear', start=1., end=0., steps=4)
  loss, _ = made([dict(kind='forward_kl', weight=fall,
                       temperature=dict(kind='cosine', start=4., end=1., steps=2)),
                  dict(kind='cross_entropy', weight=dict(fall, start=0., end=1.))])
  seen = []
  fit(loss, models[0], {k: BATCH for k in range(6)}, optax.sgd(0.), steps=6,
      frozen=dict(teacher_params=models[1]),
      hooks=[lambda step, m: seen.append({k: float(v) for k, v in m.items()})])
  y, target, _, mask = logits(models)
  fixed = {t: soft_labels(y, target, mask, temperature=t) for t in (4., 2.5, 1.)}
  for k, m in enumerate(seen):
    share = max(0., 1 - k / 4)
    np.testing.assert_allclose(m['forward_kl'], fixed[{0: 4., 1: 2.5}.get(k, 1.)], rtol=1e-5)
    np.testing.assert_allclose(
        m['loss'], share * m['forward_kl'] + (1 - share) * m['cross_entropy'], rtol=1e-5)


def test_several_teachers_have_their_own_losses(models):
  losses = [dict(kind='forward_kl', name='first', weight=.3, temperature=2.),
            dict(kind='forward_kl', name='second', teacher=1, weight=.7, temperature=2.),
            dict(kind='cross_entropy'), dict(kind='hidden', teacher=1)]
  second = fresh(STUDENT, 5)
  loss, learned = made(losses, teacher=(TEACHER, STUDENT))
  assert not learned                                         # the second is as wide as the student
  total, values = jax.jit(lambda p, *t: loss(p, BATCH, None, teacher_params=t))(*models, second)
  y, target, _, mask = logits(models)
  other = jax.jit(lambda p: forward(STUDENT.module, p, BATCH)[0])(second)
  for name, of in (('first', target), ('second', other)):
    np.testing.assert_allclose(values[name], soft_labels(y, of, mask, temperature=2.), rtol=2e-5)
  np.testing.assert_allclose(
      total, .3 * values['first'] + .7 * values['second'] + values['cross_entropy']
      + values['hidden'], rtol=1e-5)


@pytest.mark.slow
def test_a_recurrent_student_learns_states_and_geometry_from_attention():
  student = dataclasses.replace(STUDENT, kinds=(Layer('mamba', None),),
                                mamba=MambaOptions(inner=32, state=4, rank=2))
  loss, learned = made([dict(kind='reverse_kl'), dict(kind='hidden'), dict(kind='cka')], student)
  seen = trained(loss, {**fresh(student, 0), 'projections': learned}, fresh(TEACHER, 1))
  for name in ('reverse_kl', 'hidden', 'cka'):
    assert seen[-1][name] < seen[0][name], name


def trained(loss, params, teacher):
  """The metrics of 8 steps on a batch."""
  seen = []
  fit(loss, params, {k: BATCH for k in range(8)}, optax.adam(1e-2), steps=8,
      frozen=dict(teacher_params=teacher),
      hooks=[lambda step, m: seen.append({k: float(v) for k, v in m.items()})])
  return seen


@pytest.mark.slow
def test_an_encoders_layers_and_a_student_with_more_heads_learn_too():
  one = EncoderConfig(vocabulary=32, width=8, layers=1, heads=4, groups=4, head_width=2, hidden=16,
                      context=8, head='masked')
  other = dataclasses.replace(one, width=16, heads=2, groups=2, head_width=8, scan_layers=False)
  loss, learned = made([dict(kind='minilmv2', relation_heads=4), dict(kind='hidden')], one, other)
  seen = trained(loss, {**fresh(one, 0), 'projections': learned}, fresh(other, 1))
  for name in ('minilmv2', 'hidden'):
    assert seen[-1][name] < seen[0][name], name


def test_distill_learns_by_a_list_and_goes_on_where_it_was(tiny_model, tmp_path):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 200)
  narrow = dataclasses.replace(tiny_model.config, width=16, layers=1, hidden=16)
  student = dataclasses.replace(tiny_model, config=narrow, params=fresh(narrow, 3))
  losses = [dict(kind='reverse_kl'), dict(kind='hidden', weight=.5), dict(kind='cka', weight=0)]
  run = lambda losses: lean.distill(
      tiny_model, tmp_path / 'text.txt', student=student, losses=losses, steps=4, batch=4,
      window=16, peak=1e-2, decay='constant', workdir=tmp_path / 'run', log_every=1)
  learned = run(losses)
  rows = [json.loads(r) for r in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert {'loss', 'reverse_kl', 'hidden', 'cka'} <= set(rows[0])
  assert rows[-1]['loss'] < rows[0]['loss']
  assert 'projections' not in learned.params
  again = run(losses)                                            # restored: nothing left to do
  jax.tree.map(np.testing.assert_array_equal, again.params, learned.params)
  with pytest.raises(InputError, match='another settings'):
    run(losses[:2])


REFUSED = [
    ([], 'no losses'), (dict(kind='cka'), 'a list of dicts'),
    ([dict(kind='kl')], 'there are: cross_entropy, forward_kl'),
    ([dict(weight=1.)], 'kind None'), ([dict(kind='cross_entropy')], 'needs no teacher'),
    ([dict(kind='cka'), dict(kind='cka')], "'cka'.*a name each"),
    ([dict(kind='cka', name='loss')], "'loss'"),
    ([dict(kind='cka'), *[dict(kind='cross_entropy', name=n) for n in 'ab']], 'twice'),
    ([dict(kind='cka', weight=-1.)], 'weight of cka'),
    ([dict(kind='jsd', temperature=0)], 'temperature of jsd'),
    ([dict(kind='jsd', beta=2.)], 'beta 2.0'), ([dict(kind='jsd', k=2)], 'beta'),
    ([dict(kind='hidden', layer='last')], "no 'layer'; it has: weight, name, distance, layers"),
    ([dict(kind='hidden', distance='l1')], 'mse, cosine'),
    ([dict(kind='hidden', project=False)], '16.*24.*cka'),
    ([dict(kind='hidden', project=2)], 'project 2'),
    ([dict(kind='hidden', layers='middle')], 'uniform'),
    ([dict(kind='minilmv2')], 'without relation_heads'),
    ([dict(kind='minilmv2', relation_heads=0)], 'relation_heads 0'),
    ([dict(kind='minilmv2', relation_heads=2, relations=['x'])], 'queries, keys, values'),
    ([dict(kind='minilm', teacher_layer=2)], '-2 to 1'),
    ([dict(kind='cka', teacher=1)], 'teacher 1; there are 1')]


@pytest.mark.parametrize(('losses', 'says'), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_be_is_refused(losses, says):
  with pytest.raises(InputError, match=says):
    parsed(STUDENT, TEACHER, losses)


def test_models_that_a_loss_does_not_fit_are_refused(tiny_model, models):
  other = dataclasses.replace(TEACHER, vocabulary=48, heads=8)
  with pytest.raises(InputError, match='48.*32.*uld does not.*hidden, cka, minilmv2'):
    parsed(STUDENT, other, [dict(kind='forward_kl')])
  parsed(STUDENT, other, [dict(kind='hidden')])
  with pytest.raises(InputError, match='no loss looks at teacher 1 of 2'):
    parsed(STUDENT, (TEACHER, other), [dict(kind='hidden')])
  with pytest.raises(InputError, match='4 heads and the teacher 8; minilmv2'):
    parsed(STUDENT, other, [dict(kind='attention')])
  with pytest.raises(InputError, match='mamba and has no attention'):
    parsed(dataclasses.replace(STUDENT, kinds=(Layer('mamba'),)), TEACHER, [dict(kind='minilm')])
  loss, _ = made([dict(kind='minilmv2', relation_heads=3)])
  with pytest.raises(InputError, match="the student's width 16 of queries"):
    jax.eval_shape(lambda p: loss(p, BATCH, None, teacher_params=models[1]), models[0])
  odd = dataclasses.replace(STUDENT, groups=4)
  loss, _ = made([dict(kind='minilm')], odd)
  with pytest.raises(InputError, match='4 heads and the teacher 2; minilmv2'):
    jax.eval_shape(lambda p: loss(p, BATCH, None, teacher_params=models[1]),
                   jax.eval_shape(odd.module.init, jax.random.key(0), TOKENS)['params'])
  with pytest.raises(InputError, match='function'):
    train(tiny_model.module, tiny_model.params, None, steps=1, peak=1., losses=[dict(weight=len)],
          teacher=(tiny_model.module, tiny_model.params))
  with pytest.raises(InputError, match='losses and temperature too'):
    lean.distill(tiny_model, 'x', losses=[dict(kind='cka')], temperature=2.)
