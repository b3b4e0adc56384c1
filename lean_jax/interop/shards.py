"""Safetensors files, written a tensor at a time; `tensors` reads them and says what they are."""
import json
import math
import re

import numpy as np

from lean_jax.errors import InputError
from lean_jax.interop.tensors import DTYPES

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_UNITS = dict(KB=10 ** 3, MB=10 ** 6, GB=10 ** 9, TB=10 ** 12)


def nbytes(size):
  """The bytes of a size like 300_000_000, '300MB' or '5GB'.

  Raises:
    InputError: it is none, or not positive.
  """
  found = re.fullmatch(r'(\d+(?:\.\d+)?) ?([KMGT]B)', size) if isinstance(size, str) else None
  number = math.floor(float(found[1]) * _UNITS[found[2]]) if found else size
  if isinstance(number, bool) or not isinstance(number, int) or number < 1:
    raise InputError(f"max_shard_size {size!r}; give bytes, or a size like '300MB' or '5GB'")
  return number


def write(folder, wanted, value, most):
  """Writes model.safetensors; or files of at most `most` bytes of tensors, and their index.

  A tensor is never cut, so a larger one has a file of its own.

  Args:
    folder: exists.
    wanted: {tensor: (shape, dtype)}, in order.
    value: a function from the name of a tensor to its array; called once for each.
    most: bytes.
  """
  cut = _cut({name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in wanted.items()},
             most)
  if len(cut) == 1:
    write_file(folder / 'model.safetensors', wanted, value)
    return
  index = {}
  for k, names in enumerate(cut):
    file = f'model-{k + 1:05}-of-{len(cut):05}.safetensors'
    write_file(folder / file, {name: wanted[name] for name in names}, value)
    index |= dict.fromkeys(names, file)
  total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in wanted.values())
  text = json.dumps(dict(metadata=dict(total_size=total), weight_map=index), indent=2)
  (folder / 'model.safetensors.index.json').write_text(text + '\n', encoding='utf-8')


def _cut(sizes, most):
  """Lists of consecutive names, of at most `most` bytes where one name is not more."""
  out, room = [[]], most
  for name, size in sizes.items():
    if size > room and out[-1]:
      out.append([])
      room = most
    out[-1].append(name)
    room -= size
  return out


def write_file(path, wanted, value, **metadata):
  """Writes one safetensors file; `wanted` and `value` as of `write`, metadata of strings."""
  # As the format's own writer does: wider types first, and a header of a multiple of eight bytes,
  # so that each tensor begins at a multiple of its type's size.
  names = sorted(wanted, key=lambda name: -wanted[name][1].itemsize)
  # transformers 4 refuses a file that does not say that it is of PyTorch's layout.
  header, at = dict(__metadata__=dict(metadata, format='pt')), 0
  for name in names:
    shape, dtype = wanted[name]
    end = at + math.prod(shape) * dtype.itemsize
    header[name] = dict(dtype=_KINDS[dtype], shape=list(shape), data_offsets=[at, end])
    at = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in names:
      shape, dtype = wanted[name]
      array = np.ascontiguousarray(value(name), dtype)
      file.write(array.reshape(-1).view(np.uint8))
