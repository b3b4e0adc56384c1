"""GPTQ's files: codes, zero points and orders as GPTQModel's own kernel reads them."""
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop.hf import load_hf
from lean_jax.weights import Quantized
from tests.interop import rounding

NAME = 'gptq'
Q = 'model.layers.{}.self_attn.q_proj'
GROUPS = np.arange(32) // 16
HF = dict(hidden_size=32, num_attention_heads=2, head_dim=16)          # q_proj is [32 32]


def folder_of(tiny_folder, quantization, parts):
  """A folder whose q_proj, [32 32] of floats, are these {suffix: array} in both layers."""
  def edit(tensors):
    for layer in range(2):
      tensors.pop(Q.format(layer) + '.weight')
      tensors.update({Q.format(layer) + suffix: np.ascontiguousarray(x)
                      for suffix, x in parts.items()})
  return tiny_folder(HF | dict(quantization_config=dict(quant_method=NAME) | quantization), edit)[0]


def kernel(folder):
  return load_hf(folder)[2]['layers']['attention']['q']['kernel']


def stream(codes, bits):
  """A stream of codes as int32, by the arithmetic of whole numbers."""
  total = sum(int(c) << bits * k for k, c in enumerate(codes))
  return np.frombuffer(total.to_bytes(len(codes) * bits // 8, 'little'), '<i4')


def made(bits, form='gptq', groups=GROUPS, symmetric=False):
  """{suffix: array} of random codes, and the numbers [I O]."""
  rng, top = np.random.default_rng(bits), 2 ** bits
  codes = rng.integers(0, top, (32, 32))
  zero = np.full((2, 32), top // 2) if symmetric else rng.integers(1, top, (2, 32))
  scale = rng.uniform(.5, 1, (2, 32)).astype('<f2')
  stored = zero - 1 if form == 'gptq' else zero
  parts = {'.qweight': np.stack([stream(c, bits) for c in codes.T], axis=1),
           '.qzeros': np.stack([stream(z, bits) for z in stored]), '.scales': scale,
           '.g_idx': groups.astype(np.int32)}
  return parts, (codes - zero[groups]) * scale.astype(np.float32)[groups]


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('form', ['gptq', 'gptq_v2'])
def test_streams_of_codes_are_the_values_they_stand_for(tiny_folder, bits, form):
  groups = np.random.default_rng(0).permutation(np.arange(32) // 16)
  parts, want = made(bits, form, groups)
  how = dict(bits=bits, group_size=16, sym=False, desc_act=True, checkpoint_format=form)
  w = kernel(folder_of(tiny_folder, how, parts))
  assert isinstance(w, Quantized) and str(w.spec).startswith(f'w{bits}a16-g16')
  assert w.values.nbytes == 2 * 32 * 32 * bits // 8 and w.scale.dtype == jnp.float16
  np.testing.assert_array_equal(w.unbox()[1], want)


def test_a_symmetric_file_has_no_zero_points_here(tiny_folder):
  parts, want = made(4, symmetric=True)
  w = kernel(folder_of(tiny_folder, dict(bits=4, group_size=16), parts))
  assert str(w.spec) == 'w4a16-g16' and w.zero is None and w.order is None
  np.testing.assert_array_equal(w.unbox()[0], want)


GOOD = dict(bits=4, group_size=16, sym=False)


@pytest.mark.parametrize(('how', 'change', 'message'), [
    (dict(bits=5), {}, 'bits = 5, and lean_jax reads 2, 3, 4, 8'),
    (dict(group_size=0), {}, 'group_size = 0'),
    (dict(checkpoint_format='marlin'), {}, "checkpoint_format = 'marlin'"),
    (dict(dynamic={r'.*down.*': dict(bits=8)}), {}, 'single modules'),
    (dict(sym=True), {}, 'qzeros are not 8'),
    (dict(group_size=8), {}, r'qzeros is I32 \(2, 4\), expected I32 \[4 4\]'),
    ({}, {'.scales': None}, 'lacks .*scales'),
    ({}, {'.qweight': np.zeros((4, 32, 1), np.int32)}, 'whole words'),
    ({}, {'.qweight': np.zeros((4, 32), np.float32)}, 'F32 .* expected I32'),
    ({}, {'.qweight': np.zeros((5, 32), np.int32)}, 'expected'),
    ({}, {'.g_idx': np.zeros(32, np.int32)}, 'not 16 each'),
    ({}, {'.g_idx': np.full(32, -5, np.int32)}, 'not 16 each')])
def test_what_does_not_fit_is_one_line(tiny_folder, how, change, message):
  parts = {k: v for k, v in (made(4)[0] | change).items() if v is not None}
  with pytest.raises(InputError, match=message) as error:
    load_hf(folder_of(tiny_folder, GOOD | how, parts))
  assert '\n' not in str(error.value)


def in_order(m):
  """The model with inputs of down_proj in an order of their own."""
  order = np.stack([np.random.default_rng(k).permutation(96) for k in range(2)])
  down = m.params['layers']['mlp']['down']['kernel']
  down = dataclasses.replace(down, order=jnp.asarray(order, jnp.int32))
  mlp = m.params['layers']['mlp'] | dict(down=dict(kernel=down))
  return dataclasses.replace(m, params=m.params | dict(layers=m.params['layers'] | dict(mlp=mlp)))


@pytest.mark.parametrize(('family', 'scheme', 'encoding', 'ordered'), [
    ('llama', 'w4a16-g32', None, True), ('llama', 'w3a16-g32-asym', 'gptq_v2', False),
    ('gpt2', 'w8a16-g32', None, False), ('phi3', 'w2a16-g32', 'gptq_v2', False),
    ('mixtral', 'w4a16', 'gptq', False)])
def test_what_is_written_is_read(tmp_path, family, scheme, encoding, ordered):
  m = rounding.exact(rounding.model(family, scheme))
  m = in_order(m) if ordered else m
  lean.save(m, tmp_path / 'a', format=NAME, encoding=encoding)
  said = json.loads((tmp_path / 'a' / 'config.json').read_text())['quantization_config']
  assert said['checkpoint_format'] == (encoding or 'gptq') and said['desc_act'] == ordered
  back = lean.load(tmp_path / 'a')
  assert rounding.specs(back) == rounding.specs(m)
  for name, w in tree.named_weights(back.params).items():
    np.testing.assert_array_equal(w.unbox(), tree.named_weights(m.params)[name].unbox(), name)


@pytest.mark.parametrize(('scheme', 'encoding', 'ordered'), [
    ('w4a16-g32', 'gptq', True), ('w4a16-g32-asym', 'gptq_v2', False),
    ('w8a16-g32', 'gptq', False), ('w2a16-g32', 'gptq_v2', False), ('w3a16-g32', 'gptq', False)])
def test_their_kernel_has_our_values(tmp_path, scheme, encoding, ordered):
  pytest.importorskip('gptqmodel')
  torch = pytest.importorskip('torch')
  from gptqmodel.nn_modules.qlinear.torch import TorchLinear
  from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
  m = rounding.exact(rounding.model('llama', scheme))
  m = in_order(m) if ordered else m
  lean.save(m, tmp_path / 'a', format=NAME, encoding=encoding)
  stored = safetensors.numpy.load_file(tmp_path / 'a' / 'model.safetensors')
  w = tree.named_weights(m.params)['layers/mlp/down/kernel']
  theirs = TorchLinear(bits=w.spec.bits, group_size=32, sym=w.spec.symmetric, desc_act=ordered,
                       in_features=96, out_features=64, bias=False, pack_dtype=torch.int32,
                       register_buffers=True)
  for name, buffer in theirs.named_buffers():
    found = stored[f'model.layers.1.mlp.down_proj.{name}']
    assert found.shape == tuple(buffer.shape)
    buffer.copy_(torch.tensor(found))
  if encoding == 'gptq':
    convert_gptq_v1_to_v2_format_module(theirs, w.spec.bits, torch.int32)
  theirs.optimize = lambda *args, **kw: None                 # which compiles for minutes
  theirs.post_init()
  # A product of eleven and eight bits is exact in float32, and rounded once.
  np.testing.assert_array_equal(theirs.dequantize_weight().numpy(),
                                np.asarray(w.unbox()[1]).astype(np.float16))


def test_transformers_computes_what_we_do(tmp_path, monkeypatch):
  pytest.importorskip('gptqmodel')
  pytest.importorskip('optimum')
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  from gptqmodel.nn_modules.qlinear.torch import TorchLinear
  monkeypatch.setattr(TorchLinear, 'optimize', lambda *args, **kw: None)     # compiles for minutes
  m = rounding.exact(rounding.model('llama', 'w4a16-g32'))
  lean.save(m, tmp_path / 'a', format=NAME)
  theirs = rounding.their_logits(tmp_path / 'a', dtype=torch.float16, quantization_config=(
      transformers.GPTQConfig(bits=4, backend='gptq_torch')))
  ours = np.asarray(m.logits(rounding.IDS))
  assert np.abs(ours - theirs).max() < 3e-3 * np.abs(ours).max()             # theirs is float16


@pytest.mark.parametrize(('scheme', 'encoding', 'message'), [
    ('w8a8', None, 'activations as they are'), ('w6a16-g32', None, '2, 3, 4 or 8 bits'),
    ('w4a16-g32', 'marlin', "encoding 'marlin' of format 'gptq'; it has: gptq, gptq_v2")])
def test_what_the_format_has_no_words_for_is_one_line(tmp_path, scheme, encoding, message):
  with pytest.raises(InputError, match=message) as error:
    lean.save(rounding.model('llama', scheme), tmp_path / 'a', format=NAME, encoding=encoding)
  assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


def test_scales_and_zero_points_that_it_cannot_hold_are_told(tmp_path):
  m = rounding.exact(rounding.model('llama', 'w4a16-g32-asym'))
  change = lambda **kw: dataclasses.replace(m, params=tree.transform(m.params, [(
      'layers/(att|mlp).*', lambda w: dataclasses.replace(w, **{k: f(w) for k, f in kw.items()}))]))
  for bad, message in (
      (change(scale=lambda w: w.scale.astype(jnp.float32) * 1e-9), 'float16; save with format'),
      (change(zero=lambda w: w.zero * 0), "zero point of 0, .* encoding='gptq_v2'"),
      (change(zero=lambda w: w.zero + .5), 'whole numbers')):
    with pytest.raises(InputError, match=message):
      lean.save(bad, tmp_path / 'a', format=NAME)
    assert not list(tmp_path.iterdir())
