"""A teacher on devices of its own teaches what it does in the student's program."""
import dataclasses

import jax
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.data.batches import Batches
from lean_jax.data.windows import Windows
from lean_jax.distillation.elsewhere import Elsewhere, _rows
from lean_jax.errors import InputError
from lean_jax.training.mesh import batch_sharding, make_mesh

T, N = 12, 16


@pytest.fixture
def text(tiny_model):
  array = np.random.default_rng(0).integers(0, tiny_model.config.vocabulary, (N, T), np.uint16)
  return Windows(array, array.size, array.size, 1, 'text')


@pytest.fixture(scope='module')
def meshes():
  """The student's devices, and the teacher's."""
  devices = jax.devices()
  return (make_mesh(data=2, fsdp=2, devices=devices[:4]),
          make_mesh(fsdp=2, tensor=2, devices=devices[4:]))


def test_of_all_tokens_the_losses_are_those_of_one_program(tiny_model, text, meshes):
  student = lean.create(tiny_model, seed=3)
  seen = []

  def run(**given):
    values = []
    model = lean.distill(
        tiny_model, text, student=student, steps=4, batch=4, peak=3e-3, window=T,
        losses=[dict(kind='reverse_kl'), dict(kind='cross_entropy', weight=.5)],
        hooks=(lambda step, metrics: values.append(float(metrics['loss'])),), **given)
    seen.append(values)
    return model
  run()
  model = run(mesh=meshes[0], teacher_mesh=meshes[1], top_k=tiny_model.config.vocabulary)
  np.testing.assert_allclose(*seen, rtol=2e-5)
  used = {d for x in jax.tree.leaves(model.params) for d in x.devices()}
  assert used == set(meshes[0].devices.flat)


def test_labels_are_made_on_the_teachers_devices_a_batch_ahead(tiny_model, text, meshes):
  place = Elsewhere(tiny_model, meshes[1], 3)
  batches = place.labelled(Batches(text, 4, 0), tiny_model)
  first = batches[0]
  assert first['label_ids'].shape == (4, T, 3) and first['label_log_probs'].shape == (4, T, 4)
  assert list(batches._begun) == [0, 1]
  for labels in batches._begun[1]:
    assert labels.devices() <= set(meshes[1].devices.flat)
  log_p = jax.nn.log_softmax(np.asarray(tiny_model.logits(first['tokens']), np.float32))[:, :-1]
  np.testing.assert_allclose(np.exp(first['label_log_probs']).sum(-1), 1, rtol=1e-5)
  np.testing.assert_allclose(
      first['label_log_probs'][:, :-1, :3], np.sort(log_p)[..., :-4:-1], rtol=1e-4, atol=1e-5)
  later = batches[5]
  again = place.labelled(Batches(text, 4, 0), tiny_model)[5]
  jax.tree.map(np.testing.assert_array_equal, later, again)
  some = batches.part(5, np.array([3, 1]))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[[3, 1]]), some, later)


class OfHost(list):
  """Rows of an array of several hosts, of which this one has some of the shards."""

  def __init__(self, x, shards):
    super().__init__(x)
    self.addressable_shards = shards


def test_rows_of_another_hosts_teacher_are_named(meshes):
  x = np.arange(8.).reshape(4, 2)
  shards = jax.device_put(x, batch_sharding(meshes[0])).addressable_shards
  ours = OfHost(x, [s for s in shards if s.index[0].start in (0, 2)])
  np.testing.assert_array_equal(_rows(ours, np.array([2, 0])), x[[2, 0]])
  with pytest.raises(InputError, match='row 1 of a batch.*of another host'):
    _rows(ours, np.array([0, 1]))


def test_what_it_cannot_do_is_said(tiny_model, text, meshes):
  run = lambda **given: lean.distill(**dict(
      teacher=tiny_model, data=text, student=tiny_model, steps=1, batch=4, window=T,
      losses=[dict(kind='forward_kl')], mesh=meshes[0], teacher_mesh=meshes[1]) | given)
  larger = dataclasses.replace(tiny_model, config=dataclasses.replace(
      tiny_model.config, vocabulary=tiny_model.config.vocabulary + 8))
  for given, says in (
      (dict(teacher=[tiny_model, tiny_model]), 'one teacher'),
      (dict(on_policy=dict(tokens=4)), 'on_policy'),
      (dict(top_k=0), 'top_k 0; give 1 to'), (dict(student=larger), 'vocabulary'),
      (dict(losses=[dict(kind='hidden')]), 'hidden looks at layers.*teacher_mesh'),
      (dict(teacher_mesh=make_mesh(data=3)), 'batch.*4.*3')):
    with pytest.raises(InputError, match=says):
      run(**given)
