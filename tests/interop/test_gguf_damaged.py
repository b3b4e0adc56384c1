"""GGUF files that are damaged or say what is not so: a line each, no memory for what they claim."""
import contextlib
import struct
import tracemalloc

import numpy as np
import pytest

import lean_jax as lean
from lean_jax.errors import InputError
from lean_jax.interop import gguf as ours
from lean_jax.interop import gguf_file, gguf_tokenizer
from lean_jax.models.families import FAMILIES
from tests.interop.gguf_bytes import Q4_0, file_of, small


def refused(data, tmp_path, *words):
  (tmp_path / 'a.gguf').write_bytes(data)
  with pytest.raises(InputError) as error:
    lean.load(tmp_path / 'a.gguf')
  message = str(error.value)
  assert '\n' not in message and len(message) < 600
  assert all(word in message for word in words), message


@pytest.mark.parametrize(('keys', 'tensors', 'words'), [
    ({'general.architecture': 'gpt2'}, {}, "architecture 'gpt2'; lean_jax reads: llama"),
    ({'general.architecture': [1]}, {}, 'architecture [1]'),
    ({'llama.block_count': 3}, {}, 'missing blk.2.'),
    ({'llama.block_count': 2 ** 31 - 1}, {}, 'keys say 2147483647 layers, it has 20 tensors'),
    ({'llama.embedding_length': 2 ** 30}, {}, 'do not fit'),
    ({'llama.attention.head_count': 0}, {}, 'head_count is 0, expected a positive int'),
    ({'llama.attention.head_count_kv': [2, 1]}, {}, 'head_count_kv is [2, 1]'),
    ({'llama.attention.layer_norm_rms_epsilon': float('nan')}, {}, 'epsilon is nan'),
    ({'llama.expert_count': 8}, {}, 'has experts'),
    ({'llama.rope.dimension_count': 4}, {}, 'rope.dimension_count'),
    ({'llama.rope.scaling.type': 'yarn'}, {}, "positions scaled by 'yarn'"),
    ({'general.alignment': 24}, {}, 'alignment is 24'),
    ({'tokenizer.ggml.model': 'bert'}, {}, "tokenizer of kind 'bert'"),
    ({'tokenizer.ggml.model': 'gpt2'}, {}, 'no merges'),
    ({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.merges': ['a b', 'x y']}, {},
     'has no tokenizer that can be built'),
    ({'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'falcon'}, {}, "as 'falcon' does"),
    ({'tokenizer.ggml.tokens': ['a', 'a']}, {}, 'not each of them once'),
    ({'tokenizer.ggml.bos_token_id': 99}, {}, 'past them'),
    ({'tokenizer.ggml.scores': [1.]}, {}, 'no score of each'),
    ({}, {'token_embd.weight': ((10, 32), Q4_0, bytes(180))}, '12 tokens and a table of 10'),
    ({}, {'more.weight': ((32,), 0, bytes(128))}, 'unknown more.weight'),
    ({}, {'output_norm.weight': ((31,), 0, bytes(124))}, 'misshapen output_norm.weight'),
    ({}, {'output_norm.weight': ((32,), Q4_0, bytes(18))}, 'rounded output_norm.weight'),
    ({}, {'blk.0.ffn_up.weight': ((64, 31), Q4_0, bytes(64 * 18))}, 'rows of blocks of 32'),
    ({}, {'blk.0.ffn_up.weight': ((64, 0), 0, b'')}, 'shape (64, 0)'),
    ({}, {'blk.0.ffn_up.weight': ((64, 32), 10, bytes(64))}, 'ffn_up.weight (Q2_K)'),
    ({}, {'blk.0.ffn_up.weight': ((64, 32), 77, bytes(64))}, 'ffn_up.weight (77)'),
    ({}, {'blk.0.ffn_up.weight': ((2 ** 60, 32), Q4_0, bytes(64))}, 'bytes at'),
    ({}, {'blk.0.ffn_up.weight': ((1, 1, 1, 64, 32), Q4_0, bytes(64 * 18))}, '5 axes'),
])
def test_a_file_that_lies_is_refused(tmp_path, keys, tensors, words):
  made = small()
  refused(file_of(made[0] | keys, made[1] | tensors), tmp_path, words)


def test_what_is_no_gguf_is_refused(tmp_path):
  good = file_of(*small())
  refused(b'', tmp_path, 'asks for 4 bytes at 0')
  refused(b'PK' + good[2:], tmp_path, 'expected GGUF')
  refused(good[:4] + b'\1' + good[5:], tmp_path, 'version 1, expected 2 or 3')
  refused(good[:4] + struct.pack('>I', 3) + good[8:], tmp_path, 'version 50331648')
  refused(good.replace(b'blk.0.ffn_up', b'blk.1.ffn_up'), tmp_path, 'twice')
  with pytest.raises(InputError, match='cannot read .*b.gguf'):
    lean.load(tmp_path / 'b.gguf')
  (tmp_path / 'b.gguf').write_bytes(good)
  with pytest.raises(InputError, match=r'has a.gguf, b.gguf; name one of them'):
    lean.load(tmp_path)


def looked_at(path):
  """All that is made of a header; the params of a config are not."""
  with contextlib.ExitStack() as stack:
    keys, found = gguf_file.opened(path, stack)
    hf, _ = ours.described(keys, found, path)
    gguf_tokenizer.read(keys, path)
    return FAMILIES[hf['model_type']].from_hf(hf), found


def test_every_truncation_is_refused(tmp_path):
  good, path = file_of(*small()), tmp_path / 'a.gguf'
  for length in [*range(0, 1200, 3), *range(1200, len(good) - 40, 97)]:
    path.write_bytes(good[:length])
    with pytest.raises(InputError):
      looked_at(path)


def test_thousands_of_broken_headers_are_read_or_refused(tmp_path):
  good, path, rng = bytearray(file_of(*small())), tmp_path / 'a.gguf', np.random.default_rng(0)
  path.write_bytes(good)
  plain, _ = looked_at(path)
  end = good.index(b'blk.1.ffn_norm.weight') + 60            # of the header
  huge = [struct.pack('<Q', n) for n in (2 ** 63, 2 ** 64 - 1, 2 ** 40, 2 ** 31, 10 ** 6, 0)]
  read, refusals = 0, []
  tracemalloc.start()
  for turn in range(5000):
    if turn == 500:                                          # which makes all four times as slow
      _, peak = tracemalloc.get_traced_memory()
      tracemalloc.stop()
    bad = bytearray(good)
    for _ in range(rng.integers(1, 4)):
      at = int(rng.integers(4, end))
      if turn % 2:
        bad[at] = rng.integers(0, 256)
      else:
        value = huge[rng.integers(len(huge))][:int(rng.choice([1, 4, 8]))]
        bad[at:at + len(value)] = value
    path.write_bytes(bad)
    try:
      config, _ = looked_at(path)
      assert config.layers <= 20 and config.width == plain.width
      read += 1
    except InputError as error:
      refusals.append(str(error))
  assert read > 100 and len(refusals) > 1000
  assert not any('\n' in message or len(message) > 1500 for message in refusals)
  assert peak < 30 * len(good)                               # and not what a header claims
