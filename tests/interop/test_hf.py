import dataclasses
import functools
import json
import pathlib
import tracemalloc
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.core import meta

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop import streaming
from lean_jax.interop.hf import load_hf, save_hf
from lean_jax.models.families import FAMILIES
from lean_jax.models.segments import converted
from lean_jax.quantization.rtn import rtn
from lean_jax.training.mesh import make_mesh, shardings


def refused(folder, *words):
  with pytest.raises(InputError) as error:
    load_hf(folder)
  message = str(error.value)
  assert '\n' not in message
  assert all(word in message for word in words), message


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_layers_are_stacked_and_linears_transposed(tiny_folder):
  folder, tensors = tiny_folder()
  family, config, params, hf = load_hf(folder)
  assert (family.model_type, config.head_width) == ('llama', 6)
  assert config.attention.ropes[0].theta == 500.
  assert hf['eos_token_id'] == 2
  down = params['layers']['mlp']['down']['kernel']
  assert (down.dims, down.axes) == ('nio', ('layers', 'mlp', 'embed'))
  np.testing.assert_array_equal(
      down.value[1], tensors['model.layers.1.mlp.down_proj.weight'].T)
  np.testing.assert_array_equal(
      params['embed']['table'].value, tensors['model.embed_tokens.weight'])
  assert tree.parameters(params) == sum(x.size for x in tensors.values())


@pytest.mark.parametrize('tied', [True, False])
def test_saving_is_the_inverse_of_loading(tiny_folder, tmp_path, tied):
  folder, tensors = tiny_folder(dict(tie_word_embeddings=tied))
  family, config, params, hf = load_hf(folder)
  save_hf(tmp_path, family, config, params, hf)
  equal(safetensors.numpy.load_file(tmp_path / 'model.safetensors'), tensors)
  again = load_hf(tmp_path)
  assert again[1] == config
  equal(again[2], params)
  assert [again[3][k] for k in ('bos_token_id', 'eos_token_id')] == [1, 2]


def test_half_precision_is_read_exactly_and_kept_on_request(tiny_folder, tmp_path):
  folder, tensors = tiny_folder(edit=lambda t: {
      name: x.astype(ml_dtypes.bfloat16 if 'mlp' in name else np.float16)
      for name, x in t.items()})
  up = tensors['model.layers.0.mlp.up_proj.weight']
  family, config, params, _ = load_hf(folder)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
  np.testing.assert_array_equal(params['layers']['mlp']['up']['kernel'].value[0],
                                up.T.astype(np.float32))
  _, config, params, _ = load_hf(folder, dtype='bfloat16')
  assert (config.dtype, params['norm']['scale'].dtype) == ('bfloat16', 'bfloat16')
  save_hf(tmp_path, family, config, params)
  assert json.loads((tmp_path / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  equal(load_hf(tmp_path, dtype='bfloat16')[2], params)


def test_quantized_weights_are_saved_as_their_dense_values(tiny_folder, tmp_path):
  family, config, params, _ = load_hf(tiny_folder()[0])
  rule = ('layers/.*', functools.partial(rtn, spec='w8a16'))
  lean = tree.transform(params, [rule])
  save_hf(tmp_path, family, config, lean)
  equal(meta.unbox(load_hf(tmp_path)[2]), meta.unbox(lean))


def test_shards_are_found_by_their_index(tiny_folder):
  folder, tensors = tiny_folder()
  whole = load_hf(folder)[2]
  (folder / 'model.safetensors').unlink()
  names = sorted(tensors)
  parts = {'a.safetensors': names[::2], 'b.safetensors': names[1::2]}
  for file, part in parts.items():
    safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
  index = folder / 'model.safetensors.index.json'
  weight_map = {n: file for file, part in parts.items() for n in part}
  index.write_text(json.dumps(dict(weight_map=weight_map)))
  equal(load_hf(folder)[2], whole)
  (folder / 'b.safetensors').rename(folder / 'c.safetensors')
  refused(folder, 'lacks b.safetensors', 'download')
  for bad in ({}, dict(weight_map=3), dict(weight_map=dict(x='../a.safetensors'))):
    index.write_text(json.dumps(bad))
    refused(folder, 'no weight_map')
  index.write_text('{"weight_map"')
  refused(folder, 'is not JSON')


@pytest.mark.parametrize('most', ['1KB', 700, '1GB'])
def test_a_model_is_saved_in_files_of_a_size(tiny_folder, tmp_path, most):
  family, config, params, hf = load_hf(tiny_folder()[0])
  save_hf(tmp_path, family, config, params, hf, max_shard_size=most)
  files = [path.name for path in tmp_path.glob('*.safetensors')]
  assert (len(files) > 3) == (most != '1GB') == (tmp_path / 'model.safetensors.index.json').exists()
  again = load_hf(tmp_path)
  assert again[1] == config
  equal(again[2], params)
  with pytest.raises(InputError, match='max_shard_size'):
    save_hf(tmp_path, family, config, params, hf, max_shard_size='some')


def test_each_tensor_is_saved_in_its_dtype(tiny_folder, tmp_path):
  family, config, params, hf = load_hf(tiny_folder()[0])
  mixed = jax.tree.map(lambda x: x.astype('bfloat16') if x.ndim > 2 else x, params)
  save_hf(tmp_path, family, config, mixed, hf)
  saved = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert {str(x.dtype) for n, x in saved.items() if 'proj' in n} == {'bfloat16'}
  assert {str(x.dtype) for n, x in saved.items() if 'norm' in n} == {'float32'}
  assert json.loads((tmp_path / 'config.json').read_text())['torch_dtype'] == 'float32'


def test_quantized_weights_written_out_are_saved_alike(tiny_folder, tmp_path):
  family, config, params, _ = load_hf(tiny_folder()[0])
  lean = tree.transform(params, [('layers/mlp/up/.*', functools.partial(rtn, spec='w8a16'))])
  for name, model in dict(stacked=(config, lean), out=converted(config, lean, False)).items():
    (tmp_path / name).mkdir()
    save_hf(tmp_path / name, family, *model)
  equal(*(safetensors.numpy.load_file(tmp_path / name / 'model.safetensors')
          for name in ('stacked', 'out')))


def test_layers_are_read_stacked_or_written_out_and_converted_exactly(tiny_folder):
  folder, _ = tiny_folder()
  _, config, stacked, _ = load_hf(folder)
  _, other, out, _ = load_hf(folder, scan_layers=False)
  assert (config.scan_layers, other.scan_layers) == (True, False)
  for one, wanted in ((converted(config, stacked, False), (other, out)),
                      (converted(other, out, True), (config, stacked)),
                      (converted(other, out, False), (other, out))):
    assert one[0] == wanted[0] and jax.tree.structure(one[1]) == jax.tree.structure(wanted[1])
    equal(one[1], wanted[1])


@pytest.mark.parametrize('scan', [True, False])
def test_each_device_is_given_its_part(tiny_folder, scan):
  folder, _ = tiny_folder()
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  whole = load_hf(folder, scan_layers=scan)[2]
  where = shardings(whole, mesh)
  for given in (lambda like: shardings(like, mesh), where):
    params = load_hf(folder, scan_layers=scan, shardings=given)[2]
    equal(params, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == where
  layers = params['layers'] if scan else params['layers']['0']
  up = layers['mlp']['up']['kernel'].value
  assert up.addressable_shards[0].data.size * 4 == up.size
  device = jax.sharding.SingleDeviceSharding(jax.devices()[5])
  params = load_hf(folder, scan_layers=scan, shardings=device)[2]
  assert {x.sharding for x in jax.tree.leaves(params)} == {device}


def test_a_model_is_read_and_written_without_a_second_copy(tiny_folder, tmp_path, monkeypatch):
  """What NumPy allocates is but blocks: that an array is the memory filled, test_streaming says."""
  monkeypatch.setattr(streaming, '_THREADS', 2)
  folder, tensors = tiny_folder(dict(
      hidden_size=512, intermediate_size=2048, num_hidden_layers=4, vocab_size=4096,
      num_attention_heads=8, num_key_value_heads=8, head_dim=64))
  size, room = sum(x.nbytes for x in tensors.values()), 20e6
  del tensors
  assert size > 4 * room
  tracemalloc.start()
  try:
    family, config, params, _ = load_hf(folder)
    save_hf(tmp_path, family, config, params)
    assert tracemalloc.get_traced_memory()[1] < room
  finally:
    tracemalloc.stop()


def test_old_and_new_spellings_and_defaults(tiny_folder):
  folder, _ = tiny_folder(dict(num_key_value_heads=2, head_dim=4))
  hf = json.loads((folder / 'config.json').read_text())
  old = {k: v for k, v in hf.items() if k not in (
      'rope_parameters', 'dtype', 'head_dim', 'num_key_value_heads')}
  from_hf = FAMILIES['llama'].from_hf
  for scaling in (None, dict(rope_type='default')):
    assert from_hf(old | dict(rope_theta=500., torch_dtype='bfloat16', rope_scaling=scaling,
                              head_dim=None)) == from_hf(hf)
  assert from_hf(old).attention.ropes[0].theta == 10_000.
  assert from_hf(hf | dict(rope_theta=500, rope_parameters=None)) == from_hf(hf)


@pytest.mark.parametrize(('change', 'words'), [
    (dict(model_type='gpt9'), ["'gpt9'", 'reads: ', 'llama']),
    (dict(model_type=None), ['None', 'reads: ', 'llama']),
    (dict(rope_scaling=dict(type='spiral', factor=2.)), ['rope_scaling', 'spiral']),
    (dict(rope_parameters=dict(rope_type='llama3', factor=8.)), ['low_freq_factor = None']),
    (dict(rope_parameters=dict(full_attention=dict(rope_type='default'))), ['rope_parameters']),
    (dict(rope_parameters=dict(partial_rotary_factor=.5)), ['partial_rotary_factor']),
    (dict(rope_parameters=7), ['rope_parameters = 7']),
    (dict(partial_rotary_factor=.5), ['partial_rotary_factor = 0.5']),
    (dict(hidden_act='mish'), ["hidden_act = 'mish'"]),
    (dict(sliding_window=128), ['sliding_window = 128']),
    (dict(quantization_config=dict(bits=4)), ['quantization_config']),
    (dict(hidden_size=None), ['hidden_size = None', 'positive int']),
    (dict(vocab_size='12'), ["vocab_size = '12'"]),
    (dict(num_hidden_layers=0), ['num_hidden_layers = 0']),
    (dict(rms_norm_eps='x'), ["rms_norm_eps = 'x'", 'float']),
    (dict(num_attention_heads=3, num_key_value_heads=2), ['3 heads, 2 key']),
    (dict(head_dim=5), ['head width of 5']),
])
def test_a_config_that_we_do_not_compute_is_refused(tiny_folder, change, words):
  folder, _ = tiny_folder()
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  refused(folder, *words)


Q = 'model.layers.1.self_attn.q_proj.weight'


@pytest.mark.parametrize(('edit', 'words'), [
    (lambda t: {n: x for n, x in t.items() if n != Q}, ['missing ' + Q]),
    (lambda t: t.update({'model.layers.2.x': np.ones(1)}), ['unknown model.layers.2.x']),
    (lambda t: t.update({Q: np.ones((8, 12), np.float32)}),
     ['misshapen', Q, '(8, 12) instead of (12, 8)']),
    (lambda t: t.update({Q: np.ones((12, 8), np.int8)}), ['not float', f'{Q} I8']),
    (lambda t: {'w': np.ones(1)}, ['missing', 'more; unknown w']),
])
def test_tensors_that_do_not_fit_the_config_are_listed(tiny_folder, edit, words):
  refused(tiny_folder(edit=edit)[0], *words)


@pytest.mark.parametrize(('change', 'words'), [
    (dict(vocab_size=13), ['model.embed_tokens.weight (12, 8) instead of (13, 8)', 'lm_head']),
    (dict(intermediate_size=11), ['mlp.gate_proj.weight (10, 8) instead of (11, 8)', 'more']),
    (dict(num_hidden_layers=3), ['missing model.layers.2.', 'more']),
    (dict(num_hidden_layers=1), ['unknown model.layers.1.', 'more']),
    (dict(tie_word_embeddings=True), ['lm_head.weight that differs']),
    (dict(attention_bias=True), ['missing model.layers.0.self_attn.k_proj.bias', 'more']),
])
def test_tensors_of_another_config_are_refused(tiny_folder, change, words):
  folder, _ = tiny_folder()
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  refused(folder, *words)


@pytest.mark.parametrize(('value', 'dtype', 'told'), [
    (np.nan, 'float32', True), (-np.inf, 'bfloat16', True), (1e5, 'float16', True),
    (1e5, 'float32', False), (1e5, 'bfloat16', False)])
def test_tensors_that_are_not_finite_are_named(tiny_folder, value, dtype, told):
  def edit(t):
    t[Q][3, 2] = t['model.norm.weight'][1] = value
  folder, _ = tiny_folder(edit=edit)
  with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter('always')
    params = load_hf(folder, dtype=dtype)[2]
  assert params['layers']['attention']['q']['kernel'].shape[0] == 2
  found = [str(w.message) for w in heard]
  assert len(found) == told
  if told:
    assert f'no finite {dtype} in {Q}, model.norm.weight; ' in found[0] and '\n' not in found[0]


def test_a_tied_head_that_is_not_finite_is_told_and_not_refused(tiny_folder):
  def edit(t):
    t['model.embed_tokens.weight'][1, 2] = np.nan
    t['lm_head.weight'] = t['model.embed_tokens.weight'].copy()
  with pytest.warns(UserWarning, match=r'in model\.embed_tokens\.weight; '):
    load_hf(tiny_folder(dict(tie_word_embeddings=True), edit)[0])


def test_constants_and_a_repeated_tied_head_are_no_parameters(tiny_folder):
  def edit(t):
    t['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(3, np.float32)
    t['lm_head.weight'] = t['model.embed_tokens.weight'].copy()
  params = load_hf(tiny_folder(dict(tie_word_embeddings=True), edit)[0])[2]
  assert 'head' not in params


def test_a_head_that_is_tied_but_differs_is_refused(tiny_folder):
  edit = lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight'] + 1})
  refused(tiny_folder(dict(tie_word_embeddings=True), edit)[0], 'lm_head.weight', 'tie_word')


@pytest.mark.parametrize('keep', [0, 5, 300, -1])
def test_a_truncated_file_is_refused(tiny_folder, keep):
  folder, _ = tiny_folder()
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:keep])
  refused(folder, 'model.safetensors', 'cannot be read', 'download it again')


def test_files_that_are_absent_or_not_ours_are_named(tiny_folder, tmp_path):
  folder, _ = tiny_folder()
  refused(tmp_path / 'none', 'is no folder')
  refused(tmp_path, 'config.json', 'No such file')
  (folder / 'model.safetensors').unlink()
  refused(folder, 'no model.safetensors')
  (folder / 'pytorch_model.bin').touch()
  refused(folder, 'pytorch_model.bin', 'convert', 'save_pretrained')
  (folder / 'config.json').write_text('[]')
  refused(folder, 'config.json', 'list')
  (folder / 'config.json').write_text('{')
  refused(folder, 'config.json', 'is not JSON')
  with pytest.raises(InputError, match='float8'):
    load_hf(folder, dtype='float8')


def test_parameters_of_another_config_are_not_saved(tiny_folder, tmp_path):
  family, config, params, _ = load_hf(tiny_folder()[0])
  with pytest.raises(InputError, match='layers/attention/k/kernel'):
    save_hf(tmp_path, family, dataclasses.replace(config, layers=3), params)
  with pytest.raises(InputError, match='extra'):
    save_hf(tmp_path, family, config, params | dict(extra=np.ones(2)))
  with pytest.raises(InputError, match='cannot write'):
    save_hf(pathlib.Path(tmp_path, 'none'), family, config, params)
