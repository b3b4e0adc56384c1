"""GGUF files: what they round stays so, what lies is refused, and llama.cpp reads what we write."""
import ctypes
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax import tree
from lean_jax.data.tokenizer import load_tokenizer, train_bpe
from lean_jax.errors import InputError
from lean_jax.interop import gguf as ours
from lean_jax.interop import gguf_codes, gguf_encode, gguf_file, gguf_tokenizer
from lean_jax.models.families import FAMILIES
from lean_jax.weights import Quantized
from tests.interop.gguf_bytes import (
  Q4_K,
  Q6_K,
  TOKENS,
  file_of,
  llama_keys,
  llama_tensors,
  small,
)

HF = dict(vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2,
          num_attention_heads=4, num_key_value_heads=2, hidden_act='silu',
          max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
          sliding_window=None)


@pytest.fixture(scope='module')
def tokenizer():
  return train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 300)


def model(family, tokenizer, **change):
  family = FAMILIES[family]
  hf = HF | dict(model_type=family.model_type, vocab_size=tokenizer.size) | change
  config = family.from_hf(hf)
  like = jax.eval_shape(config.module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  rng = np.random.default_rng(0)
  one = lambda path, x: jnp.asarray(
      rng.normal(size=x.shape) * .15 + ('norm' in jax.tree_util.keystr(path)), jnp.float32)
  params = jax.tree_util.tree_map_with_path(one, like['params'])
  return lean.Model(family, config, params, tokenizer, hf)


# Where each type has float16 numbers, which random bytes would make infinite.
HALVES = dict(Q8_0=(0,), Q4_0=(0,), Q4_1=(0, 2), Q5_0=(0,), Q5_1=(0, 2), Q4_K=(0, 2), Q5_K=(0, 2),
              Q6_K=(208,), MXFP4=())


@pytest.mark.parametrize('kind', gguf_codes.KINDS)
def test_blocks_are_the_numbers_that_the_formats_package_reads(kind):
  gguf = pytest.importorskip('gguf')
  block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  assert (kind, block, size) in gguf_file.TYPES.values()
  rng = np.random.default_rng(0)
  raw = rng.integers(0, 256, (5, 2 * size), dtype=np.uint8)
  each = raw.reshape(10, size)
  for at in HALVES[kind]:
    each[:, at:at + 2] = rng.normal(size=(10, 1)).astype('<f2').view(np.uint8)
    each[0, at:at + 2] = 0                                   # a block of zeros, or of one number
  if HALVES[kind] == (0, 2):
    each[1, :2] = 0
  if kind == 'MXFP4':
    each[:, 0] = rng.integers(100, 150, 10)
  if kind in ('Q4_K', 'Q5_K'):
    each[2, 4:16] = 0                                        # scales of zero
  want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
  codes, scale, zero, spec = gguf_codes.parts(raw, kind)
  weight = Quantized.from_codes(jnp.asarray(codes), scale, zero, spec, want.T.shape, 'float32',
                                'io', (None, None))
  # The packed codes, whatever the scales: no float of a weight is held.
  assert weight.values.nbytes * 8 == want.size * spec.bits
  found = np.asarray(weight.unbox()).T
  if zero is None:
    np.testing.assert_array_equal(found, want)
  else:
    # (code - zero) scale of code scale + least: three roundings of numbers up to |least| + top.
    top = np.abs(zero * np.asarray(scale.astype(np.float32))).max() * 2 + np.abs(want).max()
    np.testing.assert_allclose(found, want, atol=4 * 2. ** -24 * top, rtol=0)


@pytest.mark.parametrize('encoding', [
    'F32', 'F16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'MXFP4'])
def test_what_is_written_is_what_the_formats_package_writes(tokenizer, tmp_path, encoding):
  gguf = pytest.importorskip('gguf')
  m = model('llama', tokenizer)
  lean.save(m, tmp_path / 'a.gguf', format='gguf', encoding=encoding)
  reader = gguf.GGUFReader(tmp_path / 'a.gguf')
  found = {t.name: t for t in reader.tensors}
  lean.save(m, tmp_path / 'hf', format='hf')
  theirs = safetensors.numpy.load_file(tmp_path / 'hf' / 'model.safetensors')
  assert {ours.theirs(name) for name in theirs} == set(found)
  for name, x in theirs.items():
    if 'q_proj' in name or 'k_proj' in name:                 # as convert_hf_to_gguf has them
      heads = 4 if 'q_proj' in name else 2
      x = x.reshape(heads, 2, 4, -1).swapaxes(1, 2).reshape(x.shape)
    tensor = found[ours.theirs(name)]
    kind = gguf.GGMLQuantizationType['F32' if x.ndim == 1 else encoding]
    assert tensor.tensor_type == kind
    np.testing.assert_array_equal(tensor.data, gguf.quants.quantize(x, kind))
  value = lambda key: reader.fields[key].contents()
  assert value('general.architecture') == 'llama'
  assert value('llama.rope.dimension_count') == 8
  assert value('tokenizer.ggml.tokens')[:2] == ['<s>', '</s>']
  assert value('tokenizer.ggml.bos_token_id') == 0


@pytest.mark.parametrize(('scheme', 'kind'), [
    ('w4a16-g32', 'Q4_0'), ('w3a16-g32', 'Q4_0'), ('w4a16', 'Q4_0'), ('w2a16-g32', 'Q4_1'),
    ('w4a16-g32-asym', 'Q4_1'), ('w5a16-g32', 'Q5_0'), ('w5a16-g32-asym', 'Q5_1'),
    ('w6a16-g32', 'Q8_0'), ('w8a16-tensor', 'Q8_0'), ('mxfp4', 'MXFP4'), ('nf4-g32', 'F32')])
def test_codes_that_a_type_has_are_copied(tokenizer, tmp_path, scheme, kind):
  gguf = pytest.importorskip('gguf')
  m = model('llama', tokenizer)
  # Clipped, so that the largest number of a block says nothing of its grid.
  how = dict(clip='mse') if scheme[0] == 'w' else {}
  m = lean.quantize(m, scheme, where='(.*/)?(layers/.*|embed/table)', **how)
  lean.save(m, tmp_path / 'a.gguf', format='gguf', encoding='F32')
  back = lean.load(tmp_path / 'a.gguf')
  types = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / 'a.gguf').tensors}
  assert {t for n, t in types.items() if 'norm' not in n and n != 'output.weight'} == {
      gguf.GGMLQuantizationType[kind]}
  theirs = tree.named_weights(back.params)
  for name, w in tree.named_weights(m.params).items():
    if isinstance(w, Quantized):
      if kind != 'F32':
        np.testing.assert_array_equal(theirs[name].codes(), w.codes())
      wide = np.asarray(w.unbox())
      # A scale and, where there is one, the least number are rounded to eleven bits.
      bound = 0 if kind in ('MXFP4', 'F32') else 2. ** -11 * 3 * np.abs(wide).max()
      np.testing.assert_allclose(theirs[name].unbox(), wide, atol=bound, rtol=0)


@pytest.mark.parametrize(('family', 'change'), [
    ('llama', dict()), ('llama', dict(tie_word_embeddings=True, head_dim=6)),
    ('llama', dict(rope_scaling=dict(rope_type='linear', factor=2.))),
    ('llama', dict(rope_scaling=dict(rope_type='llama3', factor=8., low_freq_factor=1.,
                                     high_freq_factor=4., original_max_position_embeddings=16))),
    ('qwen2', dict(rope_theta=1e6)), ('mistral', dict(sliding_window=7))],
    ids=['llama', 'tied', 'linear', 'llama3', 'qwen2', 'mistral'])
def test_a_model_comes_back_with_its_logits(tokenizer, tmp_path, family, change):
  pytest.importorskip('gguf')
  m = model(family, tokenizer, **change)
  lean.save(m, tmp_path / 'a.gguf', format='gguf', encoding='F32')
  back = lean.load(tmp_path)                                 # the only file of its folder
  assert back.family.model_type == family
  assert back.tokenizer.fingerprint == tokenizer.fingerprint
  ids = np.arange(40)[None] % tokenizer.size
  # Llama 3.1's frequencies come back as quotients of float32.
  np.testing.assert_allclose(back.logits(ids), m.logits(ids),
                             atol=5e-5 if 'llama3' in str(change) else 0)
  if 'llama3' not in str(change):
    assert back.config == m.config


def test_what_a_file_rounds_stays_rounded_and_can_be_saved(tmp_path):
  gguf = pytest.importorskip('gguf')
  mixed = lambda name: Q6_K if 'blk.1.ffn_down' in name or 'embd' in name else Q4_K
  tensors = llama_tensors(len(TOKENS), mixed)
  (tmp_path / 'k.gguf').write_bytes(file_of(llama_keys(TOKENS), tensors))
  m = lean.load(tmp_path / 'k.gguf')
  kinds = {name: str(w.spec) for name, w in tree.named_weights(m.params).items()}
  assert kinds['embed/table'] == kinds['layers/1/mlp/down/kernel'] == 'w6a16-g16'
  assert kinds['layers/0/mlp/down/kernel'] == 'w4a16-g32-asym'
  assert len(kinds) == 15
  def dense(name):
    shape, kind, data = tensors[name]
    raw = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind))
  np.testing.assert_array_equal(m.params['embed']['table'].unbox(), dense('token_embd.weight'))
  k = dense('blk.0.attn_k.weight').reshape(2, 32, 2, 256).swapaxes(1, 2).reshape(128, 256)
  layer = m.params['layers']['0']['attention']
  np.testing.assert_allclose(layer['k']['kernel'].unbox().T, k, atol=1e-6)
  logits = m.logits([[1, 4, 5]])
  assert np.isfinite(logits).all() and np.ptp(logits) > .1
  lean.save(m, tmp_path / 'saved')
  np.testing.assert_array_equal(lean.load(tmp_path / 'saved').logits([[1, 4, 5]]), logits)
  with pytest.raises(InputError, match=r'several types \(ffn_down.weight\)'):
    lean.load(tmp_path / 'k.gguf', scan_layers=True)


def test_layers_of_one_type_are_stacked_or_not(tmp_path):
  (tmp_path / 'a.gguf').write_bytes(file_of(*small()))
  stacked, apart = (lean.load(tmp_path / 'a.gguf', scan_layers=s) for s in (None, False))
  assert stacked.params['layers']['mlp']['up']['kernel'].values.shape == (2, 16, 64)
  ids = [[1, 4, 5, 6]]
  np.testing.assert_allclose(stacked.logits(ids), apart.logits(ids), atol=1e-5)
  half = lean.load(tmp_path / 'a.gguf', dtype='bfloat16')
  assert half.params['norm']['scale'].dtype == jnp.bfloat16
  assert half.params['layers']['mlp']['up']['kernel'].scale.dtype == jnp.float16


def test_numbers_that_are_not_finite_are_warned_of(tmp_path):
  keys, tensors = small()
  shape, kind, data = tensors['blk.1.ffn_up.weight']
  tensors['blk.1.ffn_up.weight'] = shape, kind, b'\x00\x7c' + data[2:]
  (tmp_path / 'a.gguf').write_bytes(file_of(keys, tensors))
  with pytest.warns(UserWarning, match=r'no finite float32 in blk.1.ffn_up.weight'):
    lean.load(tmp_path / 'a.gguf')


def test_sentencepiece_joins_what_has_the_best_score():
  t = gguf_tokenizer.read(llama_keys(TOKENS), 'a.gguf')
  names = lambda s: [TOKENS[k] for k in t.encode(s, special=True)]
  assert names('ab a') == ['<s>', '\u2581ab', '\u2581a']
  assert names('b') == ['<s>', '\u2581', 'b']
  assert t.decode(t.encode('ab a')) == 'ab a'
  assert (t.bos, t.eos, t.ends) == (1, 2, (2,))
  assert gguf_tokenizer.written(t, 14)['tokens'][12:] == ['[PAD12]', '[PAD13]']
  again = gguf_tokenizer.written(t, 12)
  back = gguf_tokenizer.read({f'tokenizer.ggml.{k}': v for k, v in again.items()}, 'a.gguf')
  assert back.encode('ab bab a c', special=True).tolist() == t.encode(
      'ab bab a c', special=True).tolist()


def test_a_byte_level_tokenizer_comes_back(tokenizer):
  written = gguf_tokenizer.written(tokenizer, tokenizer.size)
  assert (written['model'], written['pre'], written['add_bos_token']) == ('gpt2', 'gpt-2', True)
  back = gguf_tokenizer.read({f'tokenizer.ggml.{k}': v for k, v in written.items()}, 'a.gguf')
  assert back.fingerprint == tokenizer.fingerprint
  for pre in ('llama-bpe', 'qwen2'):
    other = gguf_tokenizer.read({f'tokenizer.ggml.{k}': v for k, v in (
        written | dict(pre=pre)).items()}, 'a.gguf')
    assert gguf_tokenizer.written(other, tokenizer.size)['pre'] == pre
    text = "it's 12345 of the  quick\n\nfox"
    assert other.decode(other.encode(text)) == text


@pytest.mark.parametrize(('change', 'message'), [
    (dict(format='gguf', encoding='Q5_K'), "no encoding 'Q5_K'; there are: F32, F16, Q8_0"),
    (dict(format='hf', encoding='F16'), "encoding 'F16' of format 'hf'"),
    (dict(format='gguf', extra=dict(a='b')), 'no other files'),
    (dict(format='ggml'), "no format 'ggml'; there are: lean, hf, gguf, ")])
def test_what_cannot_be_written_is_one_line(tokenizer, tmp_path, change, message):
  pytest.importorskip('gguf')
  m = lean.Model(FAMILIES['llama'], None, {}, tokenizer)
  with pytest.raises(InputError, match=message) as error:
    lean.save(m, tmp_path / 'a.gguf', **change)
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_other_families_and_large_numbers_are_not_written(tokenizer, tmp_path):
  pytest.importorskip('gguf')
  m = model('llama', tokenizer)
  large = dataclasses.replace(m, params=jax.tree.map(lambda x: x * 1e6, m.params))
  other = dataclasses.replace(m, family=FAMILIES['phi'])
  for bad, message in ((large, 'no finite float16; save with encoding F32'),
                       (other, 'a phi is not written as GGUF')):
    with pytest.raises(InputError, match=message):
      lean.save(bad, tmp_path / 'a.gguf', format='gguf')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'a.gguf').write_bytes(b'mine')
  with pytest.raises(InputError, match='is there already'):
    lean.save(m, tmp_path / 'a.gguf', format='gguf')
  lean.save(m, tmp_path / 'a.gguf', format='gguf', overwrite=True)
  assert math.isfinite(float(jnp.sum(lean.load(tmp_path / 'a.gguf').logits([[1, 2]]))))


@pytest.mark.parametrize('kind', ['Q4_K', 'Q6_K'])
@pytest.mark.parametrize('draw', ['normal', 'standard_t', 'exponential', 'zeros'])
def test_k_types_are_nearer_than_llama_cpps_own(kind, draw):
  gguf = pytest.importorskip('gguf')
  pytest.importorskip('xllamacpp')
  rng = np.random.default_rng(0)
  x = dict(normal=rng.normal, standard_t=lambda size: rng.standard_t(3, size=size),
           exponential=lambda size: 1 + rng.exponential(size=size),
           zeros=lambda size: np.zeros(size))[draw](size=(16, 512)).astype(np.float32)
  of = gguf.GGMLQuantizationType[kind]
  error = lambda b: np.sqrt(np.mean((gguf.quants.dequantize(b, of) - x) ** 2))
  mine = gguf_encode.encode(x, kind)
  theirs = llama_cpp_bytes(x, of.value, mine.shape)
  assert mine.dtype == np.uint8 and error(mine) <= error(theirs)


def llama_cpp_bytes(x, kind, shape):
  """What llama.cpp's own encoder makes of rows."""
  import xllamacpp
  library = ctypes.CDLL(next(str(p) for p in pathlib.Path(xllamacpp.__file__).parent.glob('*.so')))
  encode = library.ggml_quantize_chunk
  encode.restype, encode.argtypes = ctypes.c_size_t, [
      ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
  out = np.zeros(shape, np.uint8)
  assert encode(kind, x.ctypes.data, out.ctypes.data, 0, *x.shape, None) == out.nbytes
  return out


@pytest.mark.parametrize('kind', ['Q4_K', 'Q6_K'])
def test_a_model_in_a_k_type_is_read_back_in_its_codes(tokenizer, tmp_path, kind):
  pytest.importorskip('gguf')
  m = model('llama', tokenizer, hidden_size=256, head_dim=8, num_hidden_layers=1)
  lean.save(m, tmp_path / 'a.gguf', format='gguf', encoding=kind)
  back = lean.load(tmp_path / 'a.gguf')
  w = back.params['layers']['attention']['q']['kernel']
  assert isinstance(w, Quantized) and w.spec.bits == (4 if kind == 'Q4_K' else 6)
  dense = np.asarray(m.params['layers']['attention']['q']['kernel'].value)
  off = np.asarray(w.unbox()) - dense
  assert np.std(off) < (.09 if kind == 'Q4_K' else .025) * np.std(dense)
  down = back.params['layers']['mlp']['down']['kernel']       # 96 wide, no whole block: F16
  assert not isinstance(down, Quantized)


def test_llama_cpp_writes_the_same_text(real_data, tmp_path):
  pytest.importorskip('gguf')
  llama = pytest.importorskip('xllamacpp')
  folder = real_data / 'models' / 'stories260K'
  m = lean.load(folder)
  assert m.tokenizer.fingerprint == load_tokenizer(folder).fingerprint
  # It rounds activations to eight bits, so that one of the others may part at two near logits.
  small = lean.quantize(m, 'w4a16-g32', clip='mse')         # in its own codes, as Q4_0
  for given, encoding in ((small, 'F16'), *((m, e) for e in ('F16', 'Q8_0', 'Q4_0', 'Q4_1',
                                                             'Q5_0'))):
    path = tmp_path / f'{encoding}{given is small}.gguf'
    lean.save(given, path, format='gguf', encoding=encoding)
    how = llama.CommonParams()
    how.model.path, how.n_ctx, how.warmup, how.cpuparams.n_threads = str(path), 256, False, 1
    answer = llama.Server(how).handle_completions(dict(
        prompt='Once upon a time', max_tokens=59, temperature=0., top_k=1))
    text = 'Once upon a time' + answer['choices'][0]['text']
    assert lean.load(path).generate('Once upon a time', tokens=59) == text
