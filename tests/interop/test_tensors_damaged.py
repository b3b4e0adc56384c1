"""Safetensors headers that are broken at random: tensors of the file's own bytes, or one line."""
import contextlib
import json
import tracemalloc

import numpy as np
import safetensors.numpy

from lean_jax.errors import InputError
from lean_jax.interop import tensors

# What JSON, names and offsets are made of; numbers past what any type holds among them.
PIECES = [b'"', b'\\', b'\\n', b'\\u0000', b'\\ud800', b'[', b']', b'{', b'}', b',', b':', b'-',
          b'0', b'9', b'e9', b'1e999', b'NaN', b'null', b'true', b'[[', b'18446744073709551616',
          b'9' * 400, b'9' * 5000, b'4611686018427387904', b'F64', b'BF16', b'I64', b'\x00',
          b'\xff']


def looked_at(folder):
  """Opens a folder's file and reads whole what it has: [array]."""
  with contextlib.ExitStack() as stack:
    found = tensors.opened(folder, stack)
    return [t.read() for t in found.values() if t.kind in tensors.DTYPES]


def mutated(good, end, rng):
  """The bytes of a file with a header, up to `end`, that is broken in one to three places."""
  text = bytearray(good[8:end])
  for _ in range(rng.integers(1, 4)):
    at, kind = int(rng.integers(len(text))), rng.integers(4)
    piece = PIECES[rng.integers(len(PIECES))]
    if kind == 0:
      text[at] = rng.integers(256)
    elif kind == 1:
      text[at:at + len(piece)] = piece
    elif kind == 2:
      text[at:at] = piece
    else:
      del text[at:at + int(rng.integers(1, 9))]
  return len(text).to_bytes(8, 'little') + bytes(text) + good[end:]


def test_thousands_of_broken_headers_are_read_or_refused(tmp_path):
  path, rng = tmp_path / 'model.safetensors', np.random.default_rng(0)
  safetensors.numpy.save_file(dict(
      a=np.arange(6, dtype=np.float32).reshape(2, 3), none=np.zeros((0, 4), np.float16),
      scalar=np.array(1.5), words=np.arange(5, dtype=np.int32)), path, dict(format='pt'))
  good = path.read_bytes()
  end = 8 + int.from_bytes(good[:8], 'little')
  assert json.loads(good[8:end]).keys() >= {'a', 'none', 'scalar', 'words'}
  assert len(looked_at(tmp_path)) == 4
  read, refusals = 0, []
  tracemalloc.start()
  for turn in range(5000):
    if turn == 500:                                          # which makes all several times as slow
      _, peak = tracemalloc.get_traced_memory()
      tracemalloc.stop()
    path.write_bytes(mutated(good, end, rng))
    try:
      assert sum(x.nbytes for x in looked_at(tmp_path)) <= len(good)
      read += 1
    except InputError as error:
      refusals.append(str(error))
  assert read > 50 and len(refusals) > 1000
  assert not any('\n' in message or len(message) > 1500 for message in refusals)
  assert peak < 1 << 20                                      # and not what a header claims
