"""Rounded checkpoints whose config or tensors are broken at random: a matrix, or one line."""
import copy
import dataclasses
import json
import random
from typing import Any

import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.interop import formats, rounded
from lean_jax.interop.tensors import DTYPES
from lean_jax.quantization.codes import NF4
from lean_jax.quantization.nested import dynamic_numbers


@dataclasses.dataclass(frozen=True)
class Held:
  """A tensor whose array is here, and not in a file."""
  name: str
  array: Any
  shape = property(lambda self: self.array.shape)
  dtype = property(lambda self: self.array.dtype)
  kind = property(lambda self: next(k for k, d in DTYPES.items() if d == self.array.dtype))

  def read(self):
    return self.array


def zeros(*shape, dtype=np.int32):
  return np.zeros(shape, dtype)


def ones(*shape, dtype=np.float32):
  return np.ones(shape, dtype)


STATE = '.weight.quant_state.bitsandbytes__nf4'
X = dict(num_bits=8, type='int', symmetric=True, dynamic=False, strategy='tensor')
GOOD = {
    'packed': (dict(
        quant_method='compressed-tensors', sparsity_config=dict(format='dense'),
        config_groups=dict(g=dict(
            targets=['Linear', 're:.*q'], input_activations=None, weights=dict(
                num_bits=4, type='int', strategy='group', group_size=4, symmetric=False)))),
        {'.weight_packed': zeros(12, 1), '.weight_shape': np.array([12, 8]),
         '.weight_scale': ones(12, 2), '.weight_zero_point': zeros(2, 2)}),
    'static': (dict(quant_method='compressed-tensors', config_groups=dict(g=dict(
        targets=['Linear'], input_activations=X, weights=dict(num_bits=8, strategy='channel')))),
        {'.weight': zeros(12, 8, dtype=np.int8), '.weight_scale': ones(12, 1),
         '.input_scale': ones(1)}),
    'nf4': (dict(quant_method='bitsandbytes', load_in_4bit=True, llm_int8_threshold=6.),
            {'.weight': zeros(48, 1, dtype=np.uint8), '.weight.absmax': zeros(3, dtype=np.uint8),
             '.weight.nested_absmax': ones(1), '.weight.quant_map': NF4,
             '.weight.nested_quant_map': dynamic_numbers(), STATE: dict(
                 quant_type='nf4', blocksize=32, dtype='float32', shape=[12, 8],
                 nested_blocksize=256, nested_offset=.5)}),
    'int8': (dict(load_in_8bit=True, llm_int8_threshold=6.),
             {'.weight': zeros(12, 8, dtype=np.int8), '.SCB': ones(12),
              '.weight_format': np.array(0, np.uint8)}),
    'gptq': (dict(quant_method='gptq', bits=4, group_size=16, sym=False, checkpoint_format='gptq',
                  dynamic={'-:a': {}}),
             {'.qweight': zeros(4, 32), '.qzeros': zeros(2, 4), '.scales': ones(2, 32),
              '.g_idx': (np.arange(32) // 16).astype(np.int32)}),
    'awq': (dict(quant_method='awq', bits=4, group_size=16, version='gemm', zero_point=True),
            {'.qweight': zeros(32, 4), '.qzeros': zeros(2, 4), '.scales': ones(2, 32)}),
}
ODD = (None, True, False, 0, -1, 3, 4, 8, 8., 1 << 70, 1.5, float('nan'), 'x', '', 'int', 'tensor',
       'channel', [], [1], [None], ['re:('], {}, dict(a=1), [[]], 'a\nb')
OTHER = (np.int32, np.uint8, np.float32, np.int64, np.int8)


def spoiled(tree, rng):
  """A nested dict or list with one of its values exchanged or removed."""
  keys = list(tree if isinstance(tree, dict) else range(len(tree)))
  key = rng.choice([k for k in keys if k != 'quant_method'])
  inner = tree[key]
  if isinstance(inner, dict | list) and inner and rng.random() < .8:
    spoiled(inner, rng)
  elif rng.random() < .2:
    del tree[key]
  else:
    tree[key] = copy.deepcopy(rng.choice(ODD))
  return tree


def changed(array, rng):
  """Another array instead of one."""
  return rng.choice([
      lambda: array[..., :-1] if array.ndim else array[None], lambda: array[None],
      lambda: array.reshape(-1)[:1].reshape(()),
      lambda: array.astype(rng.choice(OTHER)), lambda: np.zeros((0,) * array.ndim, array.dtype),
      lambda: np.full_like(array, rng.choice([0, 7, 100]))])()


@pytest.mark.parametrize('kind', GOOD)
def test_what_is_broken_is_a_matrix_or_one_line(kind):
  rng, read, refusals = random.Random(0), 0, []
  for turn in range(400):
    how, parts = copy.deepcopy(GOOD[kind])
    if turn and rng.random() < .7:
      spoiled(how, rng)
    for name in rng.sample(list(parts), rng.randint(0, 2) if turn else 0):
      if name == STATE:
        spoiled(parts[name], rng)
      elif rng.random() < .2:
        del parts[name]
      else:
        parts[name] = changed(parts[name], rng)
    if STATE in parts:
      parts[STATE] = np.frombuffer(json.dumps(parts[STATE]).encode(), np.uint8)
    found = {f'm.q{k}': Held(f'm.q{k}', v) for k, v in parts.items()}
    try:
      for tensor in formats.opened(found, dict(quantization_config=how)).values():
        if isinstance(tensor, rounded.Rounded):
          matrix = tensor.read()
          assert matrix.codes.shape == (tensor.inputs, tensor.outputs)
          assert rounded.quantized(matrix, 'float32').spec.bits == tensor.spec.bits
          read += 1
    except InputError as error:
      refusals.append((turn, str(error)))
  assert read > 20 and len(refusals) > 100 and refusals[0][0]            # what is whole is read
  assert not any('\n' in message or len(message) > 1000 for _, message in refusals)
