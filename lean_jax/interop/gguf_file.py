"""GGUF files: their keys, and their tensors found without reading them.

The format (github.com/ggml-org/ggml, docs/gguf.md), little-endian: 'GGUF', the version, how many
tensors and keys there are; of each key its name, type and value; of each tensor its name, axes (the
innermost first), type and offset; then, from a multiple of the alignment on, the tensors. What a
header claims is held against the bytes that the file has left before anything is made of it.
"""
import dataclasses
import math
import os
import pathlib
import struct
from typing import Any

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop.tensors import listed

# Number: name, numbers in a block, bytes of it.
TYPES = {0: ('F32', 1, 4), 1: ('F16', 1, 2), 2: ('Q4_0', 32, 18), 3: ('Q4_1', 32, 20),
         6: ('Q5_0', 32, 22), 7: ('Q5_1', 32, 24), 8: ('Q8_0', 32, 34), 12: ('Q4_K', 256, 144),
         13: ('Q5_K', 256, 176), 14: ('Q6_K', 256, 210), 30: ('BF16', 1, 2),
         39: ('MXFP4', 32, 17)}
_OTHER = {9: 'Q8_1', 10: 'Q2_K', 11: 'Q3_K', 15: 'Q8_K', 16: 'IQ2_XXS', 17: 'IQ2_XS', 18: 'IQ3_XXS',
          19: 'IQ1_S', 20: 'IQ4_NL', 21: 'IQ3_S', 22: 'IQ2_S', 23: 'IQ4_XS', 29: 'IQ1_M',
          34: 'TQ1_0', 35: 'TQ2_0'}
_NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q',
            12: 'd'}
_STRING, _ARRAY = 8, 9
_AXES, _ALIGNMENT = 4, 32
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8       # bytes of one in the header


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file that is open.

  Attributes:
    name: as in the file.
    kind: the name of its type.
    shape: the outermost axis first, as other formats have it.
    path: of the file.
    file: its descriptor.
    start: where in the file its bytes begin.
    row: bytes of a row, along the innermost axis.
  """
  name: str
  kind: str
  shape: tuple[int, ...]
  path: pathlib.Path
  file: int
  start: int
  row: int

  def read(self):
    """Its bytes, uint8 [rows, row]."""
    out = np.empty((math.prod(self.shape[:-1]), self.row), np.uint8)
    buffer, place = memoryview(out.reshape(-1)), self.start
    while buffer:
      got = os.preadv(self.file, [buffer], place)
      if not got:
        raise damaged(self.path, f'it ends within {self.name}')
      buffer, place = buffer[got:], place + got
    return out


def opened(path, stack):
  """The keys {name: value} and {name: Tensor} of a file.

  Args:
    path: of the file.
    stack: a contextlib.ExitStack that closes it.

  Raises:
    InputError: it is no GGUF file, is damaged, or has tensors of a type that is not read here.
  """
  path = pathlib.Path(path)
  try:
    file = stack.enter_context(path.open('rb'))
  except OSError as error:
    raise InputError(f'cannot read {str(path)!r}: {error.strerror}; give a GGUF file') from error
  header = _Header(path, file)
  magic, version = header.take(4), header.number('I')
  if magic != b'GGUF':
    raise damaged(path, f'it begins with {magic!r}, expected GGUF')
  if version not in (2, 3):
    raise damaged(path, f'it is of version {version}, expected 2 or 3')
  tensors, keys = (header.count(header.number('Q'), least)
                   for least in (_LEAST_TENSOR, _LEAST_KEY))
  values: dict[str, Any] = {}
  for _ in range(keys):
    name = header.text()
    if name in values:
      raise damaged(path, f'it has {name[:80]!r} twice')
    values[name] = header.value()
  infos = [header.tensor() for _ in range(tensors)]
  alignment = values.get('general.alignment', _ALIGNMENT)
  if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
    raise damaged(path, f'its alignment is {alignment!r}, expected a power of two')
  return values, _placed(header, infos, alignment)


def damaged(path, what):
  """The InputError of a file that cannot be used."""
  return InputError(f'{str(path)!r} cannot be read ({what}); download it again')


class _Header:
  """What is read of a file one value after the other, never past its end."""

  def __init__(self, path, file):
    self.path, self.file = path, file
    self.size, self.at = os.fstat(file.fileno()).st_size, 0

  def take(self, count):
    if count > self.size - self.at:
      raise damaged(self.path, f'its header asks for {count} bytes at {self.at}, the file has '
                    f'{self.size}')
    self.at += count
    got = self.file.read(count)
    if len(got) != count:
      raise damaged(self.path, 'it ends within its header')
    return got

  def number(self, code):
    return struct.unpack('<' + code, self.take(struct.calcsize('<' + code)))[0]

  def count(self, claimed, least):
    """A count of things of `least` bytes each, if the file has room for them."""
    if claimed * least > self.size - self.at:
      raise damaged(self.path, f'its header claims {claimed} values, the file has '
                    f'{self.size} bytes')
    return claimed

  def text(self):
    try:
      return self.take(self.number('Q')).decode()
    except UnicodeDecodeError as error:
      raise damaged(self.path, f'a name that is no UTF-8 before byte {self.at}') from error

  def value(self):
    kind = self.number('I')
    if kind == _STRING:
      return self.text()
    if kind in _NUMBERS:
      return self.number(_NUMBERS[kind])
    if kind != _ARRAY:
      raise damaged(self.path, f'a value of type {kind} before byte {self.at}')
    kind, claimed = self.number('I'), self.number('Q')
    if kind == _STRING:
      return [self.text() for _ in range(self.count(claimed, 8))]
    if kind not in _NUMBERS:
      raise damaged(self.path, f'an array of type {kind} before byte {self.at}')
    code = _NUMBERS[kind]
    each = struct.calcsize('<' + code)
    return np.frombuffer(self.take(self.count(claimed, each) * each), '<' + code).tolist()

  def tensor(self):
    """(name, shape, type, offset)."""
    name, axes = self.text(), self.number('I')
    if not 1 <= axes <= _AXES:
      raise damaged(self.path, f'{name[:80]!r} has {axes} axes, expected 1 to {_AXES}')
    shape = tuple(self.number('Q') for _ in range(axes))[::-1]
    return name, shape, self.number('I'), self.number('Q')


def _placed(header, infos, alignment):
  """{name: Tensor}, none of them past the end of the file or in another's bytes."""
  path, begin = header.path, -(-header.at // alignment) * alignment
  odd = [f'{name} ({_OTHER.get(kind, kind)})' for name, _, kind, _ in infos if kind not in TYPES]
  if odd:
    raise InputError(f'{str(path)!r} has tensors of types that lean_jax does not read: '
                     f'{listed(odd)}; it reads: {", ".join(name for name, _, _ in TYPES.values())}')
  out, end = {}, 0
  for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
    word, block, size = TYPES[kind]
    if name in out:
      raise damaged(path, f'it has {name[:80]!r} twice')
    if not all(shape) or shape[-1] % block:
      raise damaged(path, f'{name[:80]!r} of type {word} has shape {shape}, expected rows of '
                    f'blocks of {block}')
    row = shape[-1] // block * size
    length = math.prod(shape[:-1]) * row
    if offset % alignment or offset < end or begin + offset + length > header.size:
      raise damaged(path, f'{name[:80]!r} has {length} bytes at {offset}, the one before ends at '
                    f'{end} and the file at {header.size - begin}')
    end = offset + length
    out[name] = Tensor(name, word, shape, path, header.file.fileno(), begin + offset, row)
  return out
