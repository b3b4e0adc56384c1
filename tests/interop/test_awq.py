"""AWQ's files: eight outputs a word in an order of their own, as GPTQModel reads them."""
import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop.hf import load_hf
from tests.interop import rounding

NAME = 'awq'
Q = 'model.layers.{}.self_attn.q_proj'
HF = dict(hidden_size=32, num_attention_heads=2, head_dim=16)          # q_proj is [32 32]
HOW = dict(quant_method=NAME, bits=4, group_size=16, version='GEMM', zero_point=True)


def folder_of(tiny_folder, quantization, parts):
  """A folder whose q_proj, [32 32] of floats, are these {suffix: array} in both layers."""
  def edit(tensors):
    for layer in range(2):
      tensors.pop(Q.format(layer) + '.weight')
      tensors.update({Q.format(layer) + suffix: x for suffix, x in parts.items()})
  return tiny_folder(HF | dict(quantization_config=quantization), edit)[0]


def words(codes):
  """[R O] as [R O / 8]: a word is its outputs 7 5 3 1 6 4 2 0, the highest nibble first."""
  digits = ''.join('0123456789abcdef'[c] for c in codes.reshape(-1))
  each = [digits[k:k + 8] for k in range(0, len(digits), 8)]
  numbers = [int(''.join(w[k] for k in (7, 5, 3, 1, 6, 4, 2, 0)), 16) for w in each]
  return np.array(numbers, np.uint32).view(np.int32).reshape(len(codes), -1)


def made():
  """{suffix: array} of random codes, and the numbers [I O]."""
  rng = np.random.default_rng(0)
  codes, zero = rng.integers(0, 16, (32, 32)), rng.integers(0, 16, (2, 32))
  scale = rng.uniform(.5, 1, (2, 32)).astype('<f2')
  value = (codes - zero.repeat(16, 0)) * scale.astype(np.float32).repeat(16, 0)
  return {'.qweight': words(codes), '.qzeros': words(zero), '.scales': scale}, value


def test_words_are_the_values_they_stand_for(tiny_folder):
  parts, want = made()
  w = load_hf(folder_of(tiny_folder, HOW, parts))[2]['layers']['attention']['q']['kernel']
  assert str(w.spec) == 'w4a16-g16-asym' and w.values.nbytes == 2 * 32 * 32 // 2
  np.testing.assert_array_equal(w.unbox(), np.stack([want] * 2))


@pytest.mark.parametrize(('how', 'change', 'message'), [
    (dict(version='gemv'), {}, "version = 'gemv', and lean_jax reads 'gemm'"),
    (dict(bits=3), {}, 'bits = 3'), (dict(zero_point=False), {}, 'zero_point = False'),
    (dict(group_size=8), {}, r'expected I32 \[4 4\]'),
    ({}, {'.qzeros': None}, 'lacks .*qzeros'),
    ({}, {'.qweight': np.zeros(32, np.int32)}, 'expected two axes'),
    ({}, {'.qweight': np.zeros((32, 5), np.int32)}, r'expected I32 \[2 5\]')])
def test_what_does_not_fit_is_one_line(tiny_folder, how, change, message):
  parts = {k: v for k, v in (made()[0] | change).items() if v is not None}
  with pytest.raises(InputError, match=message) as error:
    load_hf(folder_of(tiny_folder, HOW | how, parts))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('scheme', ['w4a16-g32-asym', 'w4a16-g32'])
@pytest.mark.parametrize('family', ['llama', 'phi3'])
def test_what_is_written_is_read_here_and_there(tmp_path, family, scheme):
  m = rounding.exact(rounding.model(family, scheme))
  lean.save(m, tmp_path / 'a', format=NAME)
  back = lean.load(tmp_path / 'a')
  assert set(rounding.specs(back).values()) == {'w4a16-g32-asym'}
  for name, w in tree.named_weights(m.params).items():
    np.testing.assert_array_equal(tree.named_weights(back.params)[name].unbox(), w.unbox(), name)
  pytest.importorskip('gptqmodel')
  torch = pytest.importorskip('torch')
  from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
  stored = safetensors.numpy.load_file(tmp_path / 'a' / 'model.safetensors')
  parts = [torch.tensor(stored[f'model.layers.1.mlp.down_proj.{k}'])
           for k in ('qweight', 'qzeros', 'scales')]
  ours = np.asarray(m.params['layers']['mlp']['down']['kernel'].unbox()[1])
  np.testing.assert_array_equal(dequantize_gemm(*parts, 4, 32).numpy(), ours.astype(np.float16))


def test_transformers_computes_what_we_do(tmp_path):
  pytest.importorskip('gptqmodel')
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  m = rounding.exact(rounding.model('llama', 'w4a16-g32-asym'))
  lean.save(m, tmp_path / 'a', format=NAME)
  theirs = rounding.their_logits(tmp_path / 'a', dtype=torch.float16, quantization_config=(
      transformers.AwqConfig(bits=4, backend='torch_awq')))
  ours = np.asarray(m.logits(rounding.IDS))
  assert np.abs(ours - theirs).max() < 3e-3 * np.abs(ours).max()             # theirs is float16


@pytest.mark.parametrize(('family', 'scheme', 'message'), [
    ('llama', 'w8a16-g32', 'integers of 4 bits'), ('gpt2', 'w4a16-g32', 'Conv1D')])
def test_what_the_format_has_no_words_for_is_one_line(tmp_path, family, scheme, message):
  with pytest.raises(InputError, match=message) as error:
    lean.save(rounding.model(family, scheme), tmp_path / 'a', format=NAME)
  assert '\n' not in str(error.value) and not list(tmp_path.iterdir())
