"""The tensors of a checkpoint folder: found without reading them, read a block at a time.

A safetensors file (github.com/huggingface/safetensors, Format) is the length N of its header in
eight bytes, little-endian; N bytes of JSON, {tensor: dtype, shape, data_offsets}; and the bytes of
all tensors. It is read here and not through its package, which maps whole files into memory: what
was read once stays there, a second copy of the model.
"""
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np

from lean_jax.errors import InputError

BLOCK = 1 << 19               # elements read at once: a processor's cache holds them
RUN = 1 << 16                 # bytes; what lies between shorter runs is read too

_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
_HEADER = 100_000_000         # bytes; the format allows no more
_AXES = 64                    # NumPy has no more
FLOATS = dict(F64=np.dtype('<f8'), F32=np.dtype('<f4'), F16=np.dtype('<f2'),
              BF16=np.dtype(ml_dtypes.bfloat16))
DTYPES = FLOATS | dict(I64=np.dtype('<i8'), I32=np.dtype('<i4'), I16=np.dtype('<i2'),
                       I8=np.dtype(np.int8), U8=np.dtype(np.uint8), BOOL=np.dtype(np.bool_),
                       F8_E4M3=np.dtype(ml_dtypes.float8_e4m3fn))
_BYTES = dict(F64=8, F32=4, F16=2, BF16=2, F8_E4M3=1, F8_E5M2=1, F8_E8M0=1, C64=8, I64=8, I32=4,
              I16=2, I8=1, U64=8, U32=4, U16=2, U8=1, BOOL=1)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file that is open.

  Attributes:
    name: as in the file.
    kind: its dtype, as safetensors names it.
    shape: a tuple.
    path: of the file.
    file: its descriptor.
    start: where in the file its bytes begin.
  """
  name: str
  kind: str
  shape: tuple[int, ...]
  path: pathlib.Path
  file: int
  start: int

  @property
  def dtype(self):
    """The NumPy dtype of a kind in `DTYPES`."""
    return DTYPES[self.kind]

  def read(self):
    """The whole array."""
    return self._read(whole(self.shape))

  def blocks(self, box=None):
    """The parts of at most `BLOCK` elements that make up a box.

    Args:
      box: ((start, stop), ...), one pair an axis; None is all.

    Yields:
      (box, array). No more of the file is read than the box and what lies between short runs.
    """
    box = whole(self.shape) if box is None else box
    for part in halves(self._widened(box)):
      inside = common(part, box)
      if inside is not None:
        yield inside, self._read(part)[within(inside, part)]

  def _widened(self, box):
    """The box with inner axes whole, until what is consecutive in the file is a `RUN` long."""
    run, box = self.dtype.itemsize, list(box)
    for axis in range(len(box) - 1, 0, -1):
      start, stop = box[axis]
      if (stop - start) * run >= RUN:
        break
      box[axis] = (0, self.shape[axis])
      run *= self.shape[axis]
    return tuple(box)

  def _read(self, box):
    out = np.empty([stop - start for start, stop in box], self.dtype)
    if not out.size:
      return out
    cut = max((k for k, pair in enumerate(box) if pair != (0, self.shape[k])), default=0)
    steps = [math.prod(self.shape[k + 1:]) for k in range(len(box))]
    first = box[cut][0] * steps[cut] if box else 0
    rows = out.view(np.uint8).reshape(math.prod(out.shape[:cut]), -1) if box else (
        out.reshape(1, 1).view(np.uint8))
    for row, at in zip(rows, itertools.product(*(range(*pair) for pair in box[:cut]))):
      place = first + sum(k * step for k, step in zip(at, steps))
      self._fill(memoryview(row), self.start + place * self.dtype.itemsize)
    return out

  def _fill(self, buffer, place):
    while buffer:
      got = os.preadv(self.file, [buffer], place)
      if not got:
        raise InputError(f'{str(self.path)!r} ends within {self.name}; download it again')
      buffer, place = buffer[got:], place + got


def whole(shape):
  """The box of all of an array."""
  return tuple((0, n) for n in shape)


def common(one, other):
  """The box that two boxes share; None if they share nothing."""
  box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other))
  return box if all(a < b for a, b in box) else None


def within(box, outer):
  """The slices that take a box out of the array of an outer box."""
  return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, outer))


def halves(box, most=BLOCK):
  """Boxes of at most `most` elements that make up a box, in their order in memory."""
  if math.prod(b - a for a, b in box) <= most:
    yield box
    return
  axis = next(k for k, (a, b) in enumerate(box) if b - a > 1)
  a, b = box[axis]
  for pair in ((a, (a + b) // 2), ((a + b) // 2, b)):
    yield from halves((*box[:axis], pair, *box[axis + 1:]), most)


def opened(folder, stack):
  """{name: Tensor} of model.safetensors, or of the files that its index names.

  Args:
    folder: a path.
    stack: a contextlib.ExitStack that closes the files.

  Raises:
    InputError: there is no such file, one is damaged or not what the index says, a tensor is there
      twice, or there are only pickles.
  """
  out, index = {}, weight_map(folder)
  for path in files(folder, index):
    with readable(path):
      file = os.open(path, os.O_RDONLY)
      stack.callback(os.close, file)
      found = header(path, file)
    twice = [f'{n} ({out[n].path.name} and {path.name})' for n in found if n in out]
    if twice:
      raise InputError(f'{str(folder)!r} has tensors in two files: {listed(twice)}; give the files '
                       'of one model')
    out |= found
  lost = [f'{n} ({file})' for n, file in (index or {}).items()
          if n not in out or out[n].path.name != file]
  if lost:
    raise InputError(f'{str(folder)!r} lacks tensors where its index has them: {listed(lost)}; '
                     'download the index and these files again')
  return out


def weight_map(folder):
  """{tensor: file} of the index; None where there is model.safetensors, or no index.

  Raises:
    InputError: it is no index, or names what is no file of this folder.
  """
  index = folder / 'model.safetensors.index.json'
  if (folder / 'model.safetensors').exists() or not index.exists():
    return None
  found = read_json(index).get('weight_map')
  plain = isinstance(found, dict) and found and all(
      isinstance(v, str) and v not in ('', '.', '..') and not set(v) & set('/\\\0')
      for v in found.values())
  if not plain:
    raise InputError(f'{str(index)!r} has no weight_map of file names; download it again')
  return found


def files(folder, index):
  """The safetensors files of a checkpoint, one or those of its `weight_map`."""
  if index is not None:
    paths = [folder / name for name in sorted(set(index.values()))]
    lost = [path.name for path in paths if not path.is_file()]
    if lost:
      raise InputError(f'{str(folder)!r} lacks {listed(lost)}, which its index names; '
                       'download them again')
    return paths
  single = folder / 'model.safetensors'
  if single.is_file():
    return [single]
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
  if pickles:
    raise InputError(f'{str(folder)!r} has its weights in {listed(pickles)}, and a pickle can run '
                     'any code; convert it first: transformers save_pretrained writes safetensors')
  raise InputError(f'{str(folder)!r} has no model.safetensors and no {single.name}.index.json; '
                   'give the folder of a Hugging Face model')


def header(path, file):
  """{name: Tensor} of an open safetensors file.

  Raises:
    InputError: the file is not the tensors that its header says, one after the other.
  """
  size = os.fstat(file).st_size
  length = int.from_bytes(os.pread(file, 8, 0), 'little')
  if size < 8 or not 2 <= length <= min(size - 8, _HEADER):
    raise _damaged(path, f'its {size} bytes do not hold a header of {length}')
  try:
    found = json.loads(os.pread(file, length, 8).decode(), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise _damaged(path, f'its header: {" ".join(str(error).split())}') from error
  if not isinstance(found, dict):
    raise _damaged(path, f'its header is a {type(found).__name__}, expected an object')
  found.pop('__metadata__', None)
  spans = {name: _span(path, name, entry) for name, entry in found.items()}
  end = 0
  for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
    if start != end:
      raise _damaged(path, f'{name} begins at byte {start}, expected {end}')
    end = stop
  if end != size - 8 - length:
    raise _damaged(path, f'it has {size - 8 - length} bytes of tensors, its header says {end}')
  return {name: Tensor(name, found[name]['dtype'], tuple(found[name]['shape']), path, file,
                       8 + length + start) for name, (start, _) in spans.items()}


def metadata(file):
  """{name: string} that an open safetensors file, whose header was read, has beside its tensors."""
  length = int.from_bytes(os.pread(file, 8, 0), 'little')
  return json.loads(os.pread(file, length, 8).decode()).get('__metadata__') or {}


def _span(path, name, entry):
  """(start, stop) of a tensor's bytes, if its entry in the header makes sense."""
  number = lambda n: type(n) is int and n >= 0
  numbers = lambda v: isinstance(v, list) and all(number(n) for n in v)
  if not (isinstance(entry, dict) and isinstance(entry.get('dtype'), str)
          and numbers(entry.get('shape')) and numbers(span := entry.get('data_offsets'))
          and len(span) == 2 and span[0] <= span[1]):
    raise _damaged(path, f'its header has no dtype, shape and data_offsets of {name}')
  start, stop = span
  if len(entry['shape']) > _AXES or math.prod(n or 1 for n in entry['shape']) >= 1 << 59:
    raise _damaged(path, f'{name} has a shape that no array can have')
  wanted = math.prod(entry['shape']) * _BYTES.get(entry['dtype'], 0)
  if entry['dtype'] in _BYTES and stop - start != wanted:
    raise _damaged(path, f'{name} has {stop - start} bytes, its dtype and shape say {wanted}')
  return start, stop


def _unique(pairs):
  out = dict(pairs)
  if len(out) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f'it names {next(n for n in names if names.count(n) > 1)} twice')
  return out


def _damaged(path, what):
  what = ' '.join(what.split())[:400]                  # names in a header can be anything
  return InputError(f'{str(path)!r} cannot be read ({what}); download it again')


def read_json(path):
  """The object in a JSON file; raises InputError where there is none."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise InputError(f'cannot read {str(path)!r}: {error.strerror}; '
                     'give the folder of a Hugging Face model') from error
  except (ValueError, RecursionError) as error:
    raise InputError(f'{str(path)!r} is not JSON ({error}); download it again') from error
  if not isinstance(value, dict):
    raise InputError(f'{str(path)!r} holds a {type(value).__name__}, expected an object; '
                     'download it again')
  return value


@contextlib.contextmanager
def readable(what):
  """Turns a failure to read a file into an InputError that names `what`."""
  try:
    yield
  except OSError as error:
    raise InputError(f'{str(what)!r} cannot be read ({error.strerror}); download it again'
                     ) from error


def listed(names, most=4):
  """Names in one line: the first ones and how many more."""
  names = list(names)
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
