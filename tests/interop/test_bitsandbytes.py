"""bitsandbytes: its bytes read and written, and what transformers computes with ours."""
import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.interop.hf import load_hf
from lean_jax.quantization.codes import FP4, NF4
from lean_jax.quantization.nested import dynamic_numbers
from lean_jax.weights import Quantized
from tests.interop import rounding

NAME = 'bitsandbytes'
FOUR = dict(quant_method=NAME, load_in_4bit=True)
EIGHT = dict(quant_method=NAME, load_in_8bit=True)
Q = 'model.layers.{}.self_attn.q_proj'
DOWN = 'model.layers.1.mlp.down_proj'
STATE = '.weight.quant_state.bitsandbytes__'


def folder_of(tiny_folder, quantization, parts):
  """A folder whose q_proj, [12 8] of floats, are these {suffix: array} in both layers."""
  def edit(tensors):
    for layer in range(2):
      tensors.pop(Q.format(layer) + '.weight')
      tensors.update({Q.format(layer) + suffix: x for suffix, x in parts.items()})
  return tiny_folder(dict(quantization_config=quantization), edit)[0]


def kernel(folder):
  return load_hf(folder)[2]['layers']['attention']['q']['kernel']


def text(**state):
  return np.frombuffer(json.dumps(state).encode(), np.uint8)


def four(code='nf4', double=False, size=32):
  """{suffix: array} of 12 x 8 numbers in blocks, and the numbers."""
  rng, table = np.random.default_rng(0), dict(nf4=NF4, fp4=FP4)[code]
  codes, blocks = rng.integers(0, 16, 96, np.uint8), -(-96 // size)
  pairs = [[int(a) << 4 | int(b)] for a, b in zip(codes[::2], codes[1::2])]
  parts = {'.weight': np.array(pairs, np.uint8), '.weight.quant_map': table}
  state = dict(quant_type=code, blocksize=size, dtype='float32', shape=[12, 8])
  top = rng.uniform(.5, 1, blocks).astype(np.float32)
  parts['.weight.absmax'] = top
  if double:
    parts |= {'.weight.absmax': rng.integers(0, 256, blocks, np.uint8),
              '.weight.nested_absmax': np.float32([.25]),
              '.weight.nested_quant_map': dynamic_numbers()}
    state |= dict(nested_blocksize=256, nested_dtype='float32', nested_offset=.5)
    top = dynamic_numbers()[parts['.weight.absmax']] * np.float32(.25) + np.float32(.5)
  parts[f'{STATE}{code}'] = text(**state)
  return parts, (table[codes] * top.repeat(size)[:96]).reshape(12, 8)


@pytest.mark.parametrize('code', ['nf4', 'fp4'])
@pytest.mark.parametrize('double', [False, True])
def test_rows_shorter_than_a_block_are_the_numbers_they_stand_for(tiny_folder, code, double):
  parts, want = four(code, double)
  w = kernel(folder_of(tiny_folder, FOUR, parts))
  assert isinstance(w, Quantized) and str(w.spec) == f'{code}-g8'
  np.testing.assert_array_equal(w.unbox(), np.stack([want.T] * 2))


def test_eight_bits_are_rows_and_their_largest(tiny_folder):
  rng = np.random.default_rng(0)
  codes, top = rng.integers(-127, 128, (12, 8), np.int8), rng.uniform(1, 2, 12).astype(np.float32)
  parts = {'.weight': codes, '.SCB': top, '.weight_format': np.array(0, np.uint8)}
  w = kernel(folder_of(tiny_folder, EIGHT | dict(llm_int8_threshold=0.), parts))
  assert str(w.spec) == 'w8a8'
  np.testing.assert_allclose(w.unbox()[1], codes.T * top / 127, rtol=3e-7)


def test_columns_that_are_not_rounded_there_leave_activations_alone_here(tiny_folder):
  parts = {'.weight': np.ones((12, 8), np.int8), '.SCB': np.full(12, 127, np.float32)}
  assert str(kernel(folder_of(tiny_folder, EIGHT, parts)).spec) == 'w8a16'


STATES = dict(quant_type='nf4', blocksize=32, dtype='float32', shape=[12, 8])


@pytest.mark.parametrize(('change', 'message'), [
    ({'.weight.absmax': np.ones(4, np.float32)}, r'expected F32 \[3\]'),
    ({'.weight.absmax': np.ones(3, np.uint8)}, r'U8 \(3,\), expected F32'),
    ({'.weight.absmax': None}, 'lacks .*absmax'),
    ({'.weight': np.zeros((47, 1), np.uint8)}, 'expected the 48 bytes of 12 x 8'),
    ({'.weight.quant_map': np.zeros(16, np.float32)}, 'not that of nf4'),
    ({f'{STATE}nf4': np.frombuffer(b'{"shape": ', np.uint8)}, 'is None, expected JSON'),
    ({f'{STATE}nf4': text(**STATES | dict(quant_type='fp4'))}, "'fp4'.* expected JSON"),
    ({f'{STATE}nf4': text(**STATES | dict(shape=[2 ** 40, 8]))}, 'expected JSON'),
    ({f'{STATE}nf4': text(**STATES | dict(shape=[2 ** 30, 2 ** 30]))}, r'expected F32 \['),
    ({f'{STATE}nf4': text(**STATES | dict(blocksize=0))}, 'expected JSON'),
    ({f'{STATE}nf4': np.zeros(5000, np.uint8)}, 'expected JSON'),
    ({'.SCB': np.ones(12, np.float32)}, r'expected I8 \[\? \?\]'),
])
def test_what_does_not_fit_is_one_line(tiny_folder, change, message):
  parts = {k: v for k, v in (four()[0] | change).items() if v is not None}
  with pytest.raises(InputError, match=message) as error:
    load_hf(folder_of(tiny_folder, FOUR, parts))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('family', 'scheme'), [
    ('llama', 'nf4-g32'), ('llama', 'fp4-g32-dq'), ('gpt2', 'nf4-g64'), ('phi3', 'fp4-g32'),
    ('mixtral', 'nf4-g32-dq'), ('llama', 'w8a8'), ('gpt2', 'w8a16')])
def test_what_is_written_is_read(tmp_path, family, scheme):
  m = rounding.model(family, scheme)
  lean.save(m, tmp_path / 'a', format=NAME)
  back = lean.load(tmp_path / 'a')
  assert rounding.specs(back) == rounding.specs(m)
  rounding.same(back, m)


@pytest.mark.parametrize(('family', 'scheme'), [('llama', 'nf4-g32-dq'), ('gpt2', 'fp4-g64'),
                                                ('llama', 'w8a16')])
def test_transformers_computes_what_we_do(tmp_path, family, scheme):
  pytest.importorskip('bitsandbytes')
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  m = rounding.model(family, scheme)
  lean.save(m, tmp_path / 'a', format=NAME)
  with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter('ignore')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'a', dtype=torch.float32)
    assert any(type(x).__module__.startswith('bitsandbytes') for x in theirs.modules())
    # Its own products on a CPU are rounded to bfloat16 or float16; its numbers are not.
    theirs = theirs.dequantize(dtype=torch.float32).eval()
    logits = theirs(torch.tensor(rounding.IDS)).logits.numpy()
  ours = np.asarray(m.logits(rounding.IDS))
  assert np.abs(ours - logits).max() < 2e-5 * np.abs(ours).max()


def stored(module):
  """{suffix: array} of a module of bitsandbytes, as it saves itself."""
  return {f'.{k}': v.numpy() for k, v in module.state_dict().items()}


@pytest.mark.parametrize('code', ['nf4', 'fp4'])
@pytest.mark.parametrize('double', [False, True])
def test_four_bits_are_their_bytes(tmp_path, code, double):
  bnb, torch = pytest.importorskip('bitsandbytes'), pytest.importorskip('torch')
  m = rounding.model('llama', f'{code}-g32{"-dq" * double}')
  w = tree.named_weights(rounding.floats('llama').params)['layers/mlp/down/kernel'].unbox()[1]
  module = bnb.nn.Linear4bit(96, 64, bias=False, quant_type=code, compress_statistics=double)
  module.weight = bnb.nn.Params4bit(torch.tensor(np.asarray(w).T.copy()), requires_grad=False,
                                    quant_type=code, compress_statistics=double, blocksize=32)
  theirs = stored(module.to('cpu'))
  state = f'{STATE}{code}'
  offset = json.loads(theirs[state].tobytes()).get('nested_offset')
  lean.save(m, tmp_path / 'a', format=NAME)
  ours = safetensors.numpy.load_file(tmp_path / 'a' / 'model.safetensors')
  assert {k for k in ours if k.startswith(f'{DOWN}.')} == {DOWN + k for k in theirs}
  for suffix, x in theirs.items():
    mine = ours[DOWN + suffix]
    if suffix == state and double:                     # a mean: sums in another order
      mine, x = (json.loads(v.tobytes()) for v in (mine, x))
      assert mine | dict(nested_offset=0) == x | dict(nested_offset=0)
      assert mine['nested_offset'] == pytest.approx(offset, rel=1e-6)
    elif double and suffix == '.weight.nested_absmax':
      np.testing.assert_allclose(mine, x, rtol=1e-5)
    elif suffix == '.weight' and code == 'fp4':        # 0 and -0 change places there on a CPU
      plain = lambda v: np.where(v & 15 == 8, v & 240, np.where(v >> 4 == 8, v & 15, v))
      np.testing.assert_array_equal(plain(plain(mine)), plain(plain(x)))
    else:
      np.testing.assert_array_equal(mine, x, suffix)


def their_module(scheme):
  """down_proj of layer 1 as bitsandbytes rounds it: {suffix: array}."""
  bnb, torch = pytest.importorskip('bitsandbytes'), pytest.importorskip('torch')
  w = tree.named_weights(rounding.floats('llama').params)['layers/mlp/down/kernel'].unbox()[1]
  w = torch.tensor(np.asarray(w.astype(jnp.float16), np.float32).T.copy())
  if scheme == 'w8a16':
    module = bnb.nn.Linear8bitLt(96, 64, bias=False, has_fp16_weights=False)
    module.weight = bnb.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
  else:
    how = dict(quant_type=scheme[:3], compress_statistics='dq' in scheme)
    module = bnb.nn.Linear4bit(96, 64, bias=False, **how)
    module.weight = bnb.nn.Params4bit(w, requires_grad=False, blocksize=32, **how)
  return stored(module.to('cpu'))


@pytest.mark.parametrize('scheme', ['nf4-g32-dq', 'fp4-g32', 'w8a16'])
def test_their_file_comes_back_byte_for_byte(tmp_path, scheme):
  theirs = their_module(scheme)
  lean.save(rounding.model('llama', scheme), tmp_path / 'a', format=NAME)
  path = tmp_path / 'a' / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors |= {DOWN + suffix: x for suffix, x in theirs.items()}
  safetensors.numpy.save_file(tensors, path, metadata=dict(format='pt'))
  lean.save(lean.load(tmp_path / 'a'), tmp_path / 'b', format=NAME)
  again = safetensors.numpy.load_file(tmp_path / 'b' / 'model.safetensors')
  assert again.keys() == tensors.keys()
  for name, x in tensors.items():
    np.testing.assert_array_equal(again[name], x, name)


@pytest.mark.parametrize(('scheme', 'message'), [
    ('w4a16-g32', 'has nf4, fp4, or eight bits by channel'),
    ('nf4-g16', 'has blocks of 32, 64'), ('w8a8-tensor', 'by channel')])
def test_what_the_format_has_no_words_for_is_one_line(tmp_path, scheme, message):
  with pytest.raises(InputError, match=message) as error:
    lean.save(rounding.model('llama', scheme), tmp_path / 'a', format=NAME)
  assert '\n' not in str(error.value) and not list(tmp_path.iterdir())
