"""The API: what is saved is what is loaded, and each function is the method it names."""
import dataclasses
import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.interop import shards
from lean_jax.training.mesh import make_mesh, of, shardings
from lean_jax.weights import LowRank

TEXT = 'the quick brown fox jumps over the lazy dog\n' * 400


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def text(tmp_path):
  (tmp_path / 'text.txt').write_text(TEXT)
  return tmp_path / 'text.txt'


@pytest.mark.parametrize('make', [
    lambda m: m, lambda m: lean.quantize(m, 'w8a8'), lambda m: lean.quantize(m, 'w2a16-g16'),
    lambda m: lean.attach_lora(lean.quantize(m, 'w4a16-g16'), rank=2)],
    ids=['dense', 'w8a8', 'w2', 'qlora'])
def test_load_gives_what_save_got(tiny_model, tmp_path, make):
  model = make(tiny_model)
  lean.save(model, tmp_path / 'out')
  found = lean.load(tmp_path / 'out')
  same(found.params, model.params)
  assert found.config == model.config
  assert found.tokenizer.fingerprint == model.tokenizer.fingerprint
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_array_equal(found.logits(tokens), model.logits(tokens))


def test_the_hf_format_holds_the_dense_values(tiny_model, tmp_path):
  model = lean.attach_lora(lean.quantize(tiny_model, 'w4a16-g16'), rank=2)
  with pytest.raises(lean.InputError, match='there are'):
    lean.save(model, tmp_path / 'x', format='onnx')
  lean.save(model, tmp_path / 'out', format='hf')
  found = lean.load(tmp_path / 'out')
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_allclose(found.logits(tokens), model.logits(tokens), atol=1e-4)


@pytest.mark.parametrize('format', ['lean', 'hf'])
def test_layers_are_loaded_stacked_or_written_out(tiny_model, tmp_path, format):
  tokens = np.arange(12).reshape(2, 6)
  lean.save(tiny_model, tmp_path / 'out', format=format)
  out = lean.load(tmp_path / 'out', scan_layers=False)
  assert not out.config.scan_layers and out.params['layers'].keys() == {'0', '1'}
  same(lean.scan_layers(out).params, tiny_model.params)
  same(lean.scan_layers(tiny_model, False).params, out.params)
  # Sums are fused differently: float32.
  np.testing.assert_allclose(out.logits(tokens), tiny_model.logits(tokens), atol=1e-5)
  lean.save(out, tmp_path / 'again', format=format)
  again = lean.load(tmp_path / 'again')
  assert again.config.scan_layers == (format == 'hf')
  same(again.params, tiny_model.params if format == 'hf' else out.params)
  same(lean.load(tmp_path / 'again', scan_layers=True).params, tiny_model.params)


def test_adapters_over_few_bits_are_converted_exactly(tiny_model, tmp_path):
  model = lean.attach_lora(lean.quantize(tiny_model, 'w4a16-g16'), rank=2)
  lean.save(model, tmp_path / 'out')
  out = lean.load(tmp_path / 'out', scan_layers=False)
  same(out.params, lean.scan_layers(model, False).params)
  same(lean.scan_layers(out, True).params, model.params)


@pytest.mark.parametrize('format', ['lean', 'hf'])
def test_each_device_is_given_its_part(tiny_model, tmp_path, format):
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  model = tiny_model if format == 'hf' else lean.quantize(tiny_model, 'w8a16')
  lean.save(model, tmp_path / 'out', format=format)
  found = lean.load(tmp_path / 'out', mesh=mesh)
  same(found.params, model.params)
  assert jax.tree.map(lambda x: x.sharding, found.params) == shardings(model.params, mesh)
  tokens = np.arange(12).reshape(2, 6)
  # Sums over devices: float32.
  np.testing.assert_allclose(found.logits(tokens), model.logits(tokens), atol=1e-5)
  assert found.generate('the quick', tokens=4) == model.generate('the quick', tokens=4)


def test_a_model_on_a_mesh_is_computed_on_that_mesh(tiny_model):
  mesh = make_mesh(fsdp=2, tensor=2)
  params = jax.device_put(tiny_model.params, shardings(tiny_model.params, mesh))
  assert jax.sharding.get_abstract_mesh().empty
  with of(params):
    assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
  with of(tiny_model.params):
    assert jax.sharding.get_abstract_mesh().empty


def test_a_model_is_loaded_by_its_id_from_the_cache_of_the_hub(tiny_model, tmp_path, monkeypatch):
  from huggingface_hub import constants
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  repository = tmp_path / 'models--org--tiny'
  lean.save(tiny_model, repository / 'snapshots' / 'abc', format='hf')
  (repository / 'refs').mkdir()
  (repository / 'refs' / 'main').write_text('abc')
  same(lean.load('org/tiny').params, tiny_model.params)
  for absent in ('org/other', 'org/tiny@v2'):
    with pytest.raises(lean.InputError, match=f'{absent}.*the hub cannot be reached'):
      lean.load(absent)
  with pytest.raises(lean.InputError, match='no folder .*nothing'):
    lean.load(tmp_path / 'nothing')


def test_files_of_a_size_are_all_there_or_none_is(tiny_model, tmp_path, monkeypatch):
  lean.save(tiny_model, tmp_path / 'out', format='hf', max_shard_size='10KB')
  assert len(list((tmp_path / 'out').glob('*.safetensors'))) > 2
  same(lean.load(tmp_path / 'out').params, tiny_model.params)
  write, written = shards.write_file, []

  def full(*given):
    write(*given)
    written.append(given[0])
    if len(written) == 2:
      raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(shards, 'write_file', full)
  for target, overwrite in (('new', False), ('out', True)):
    written.clear()
    with pytest.raises(lean.InputError, match='no space left'):
      lean.save(tiny_model, tmp_path / target, format='hf', max_shard_size='10KB',
                overwrite=overwrite)
  assert [path.name for path in tmp_path.iterdir()] == ['out']
  same(lean.load(tmp_path / 'out').params, tiny_model.params)
  with pytest.raises(lean.InputError, match='max_shard_size'):
    lean.save(tiny_model, tmp_path / 'new', format='hf', max_shard_size='ten')
  assert not (tmp_path / 'new').exists()


def test_saving_over_something_needs_leave_and_a_model_there(tiny_model, tmp_path):
  lean.save(tiny_model, tmp_path / 'out')
  with pytest.raises(lean.InputError, match='there already'):
    lean.save(tiny_model, tmp_path / 'out')
  lean.save(lean.quantize(tiny_model, 'w8a8'), tmp_path / 'out', overwrite=True)
  assert tree.nbytes(lean.load(tmp_path / 'out').params) < tree.nbytes(tiny_model.params)
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'a.txt').write_text('a')
  for format in ('lean', 'hf'):
    with pytest.raises(lean.InputError, match='holds no model'):
      lean.save(tiny_model, str(tmp_path / 'mine'), overwrite=True, format=format)


def test_training_lowers_the_loss_and_adapters_leave_the_base(tiny_model, text):
  before = lean.evaluate(tiny_model, text, window=32)['perplexity']
  full = lean.train(tiny_model, text, steps=20, batch=8, peak=1e-2, window=32)
  assert lean.evaluate(full, text, window=32)['perplexity'] < before / 2
  base = lean.quantize(tiny_model, 'w4a16-g16')
  adapted = lean.train(lean.attach_lora(base, rank=4), text, steps=20, batch=8, peak=1e-2,
                       window=32)
  assert lean.evaluate(adapted, text, window=32)['perplexity'] < before
  bases = jax.tree.map(lambda w: w.base if isinstance(w, LowRank) else w, adapted.params,
                       is_leaf=tree.is_weight)
  same(bases, base.params)


def test_distillation_brings_the_student_to_its_teacher(tiny_model, text):
  teacher = lean.train(tiny_model, text, steps=30, batch=8, peak=1e-2, window=32)
  student = lean.distill(teacher, text, keep=1, steps=20, batch=8, peak=1e-2, window=32,
                         soft_weight=1.)
  assert student.config.layers == 1
  start = lean.distill(teacher, text, keep=1, steps=1, batch=8, peak=1e-9, window=32)
  tokens = jnp.asarray(teacher.tokenizer.encode(TEXT)[:60].reshape(2, 30))
  far = lambda m: float(jnp.mean((jax.nn.softmax(m.logits(tokens))
                                  - jax.nn.softmax(teacher.logits(tokens))) ** 2))
  assert far(student) < far(start) / 2


def test_a_student_that_reads_otherwise_is_refused(tiny_model, text):
  other = dataclasses.replace(
      tiny_model, tokenizer=dataclasses.replace(tiny_model.tokenizer, bos=None))
  with pytest.raises(lean.InputError, match='tokenizer'):
    lean.distill(tiny_model, text, student=other, steps=1)


def test_merging_an_adapter_keeps_the_logits(tiny_model):
  model = lean.attach_lora(lean.quantize(tiny_model, 'w8a16'), rank=2)
  params = jax.tree.map(lambda x: x + .01 if x.dtype == jnp.float32 else x, model.params)
  model = dataclasses.replace(model, params=params)
  merged = lean.merge(model)
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_allclose(merged.logits(tokens), model.logits(tokens), atol=1e-4)


def test_windows_beyond_the_context_are_refused(tiny_model, text):
  with pytest.raises(lean.InputError, match='context'):
    lean.evaluate(tiny_model, text, window=65)
