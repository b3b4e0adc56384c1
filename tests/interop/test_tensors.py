"""Safetensors files as we read and write them, against their own package."""
import contextlib
import json
import math
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lean_jax.errors import InputError
from lean_jax.interop import shards, tensors
from lean_jax.interop.tensors import BLOCK, RUN, common, halves, whole, within

RNG = np.random.default_rng(0)
DTYPES = dict(F64=np.float64, F32=np.float32, F16=np.float16, BF16=ml_dtypes.bfloat16)


def folder_of(path, **arrays):
  """A folder with these arrays in model.safetensors."""
  path.mkdir(exist_ok=True)
  safetensors.numpy.save_file(arrays, path / 'model.safetensors')
  return path


@contextlib.contextmanager
def opened(folder):
  with contextlib.ExitStack() as stack:
    yield tensors.opened(folder, stack)


def refused(folder, *words):
  with pytest.raises(InputError) as error, opened(folder):
    pass
  message = str(error.value)
  assert '\n' not in message and len(message) < 600
  assert all(word in message for word in words), message


def assembled(tensor, box):
  """The array of a box, from its blocks; each element is given once."""
  out = np.zeros([b - a for a, b in box], tensor.dtype)
  seen = np.zeros(out.shape, int)
  for part, values in tensor.blocks(box):
    assert values.shape == tuple(b - a for a, b in part)
    out[within(part, box)] = values
    seen[within(part, box)] += 1
  assert (seen == 1).all()
  return out


@pytest.mark.parametrize('kind', DTYPES)
def test_each_dtype_is_read_as_its_own_package_reads_it(tmp_path, kind):
  arrays = {f'{len(shape)}': RNG.normal(size=shape).astype(DTYPES[kind])
            for shape in ((), (5,), (0, 3), (4, 6), (2, 3, 4))}
  with opened(folder_of(tmp_path, **arrays)) as found:
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      tensor = found[name]
      assert (tensor.kind, tensor.shape, tensor.dtype) == (kind, array.shape, array.dtype)
      np.testing.assert_array_equal(tensor.read(), array, strict=True)


@pytest.mark.parametrize('box', [
    ((0, 5), (0, 7), (0, 9)), ((2, 3), (0, 7), (0, 9)), ((1, 4), (2, 5), (3, 8)),
    ((0, 5), (6, 7), (0, 9)), ((0, 5), (0, 7), (8, 9)), ((4, 5), (3, 4), (2, 3))])
def test_a_box_is_read_as_a_slice(tmp_path, box):
  array = RNG.normal(size=(5, 7, 9)).astype(np.float32)
  with opened(folder_of(tmp_path, x=array)) as found:
    np.testing.assert_array_equal(assembled(found['x'], box), array[within(box, whole((5, 7, 9)))])


def test_blocks_are_small_and_no_more_is_read_than_asked(tmp_path, monkeypatch):
  rows, width = 24, 4 * RUN // 4                     # four runs a row
  array = np.arange(rows * width, dtype=np.float32).reshape(rows, width)
  asked, preadv = [], os.preadv
  monkeypatch.setattr(os, 'preadv', lambda file, buffers, at: asked.append(
      sum(len(b) for b in buffers)) or preadv(file, buffers, at))
  with opened(folder_of(tmp_path, x=array)) as found:
    for box in (((3, 5), (0, width)), whole(array.shape), ((2, 20), (width // 4, width // 2))):
      asked.clear()
      np.testing.assert_array_equal(
          assembled(found['x'], box), array[within(box, whole(array.shape))])
      assert sum(asked) == 4 * math.prod(b - a for a, b in box)
      assert max(asked) <= 4 * BLOCK
    asked.clear()
    assembled(found['x'], ((0, rows), (5, 7)))       # what is between short runs is read
    assert sum(asked) == array.nbytes


@pytest.mark.parametrize('shape', [(), (1,), (7,), (3, 5), (1, 1, 11), (4, 3, 2)])
@pytest.mark.parametrize('most', [1, 2, 5, 100])
def test_halves_make_up_a_box(shape, most):
  seen = np.zeros(shape, int)
  for part in halves(whole(shape), most):
    assert math.prod(b - a for a, b in part) <= most
    seen[within(part, whole(shape))] += 1
  assert (seen == 1).all()


def test_boxes_that_touch_share_nothing():
  assert common(((0, 3),), ((3, 5),)) is None
  assert common(((0, 4), (2, 9)), ((3, 5), (0, 3))) == ((3, 4), (2, 3))
  assert common((), ()) == ()


def write(path, header, data=b'', length=None):
  """A file with any header, whatever its length says."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)


def entry(start, stop, shape, dtype='F32'):
  return dict(dtype=dtype, shape=shape, data_offsets=[start, stop])


GOOD = dict(a=entry(0, 8, [2]), b=entry(8, 16, [1, 2]))


@pytest.mark.parametrize(('header', 'size', 'words'), [
    (GOOD, 15, 'has 15 bytes of tensors, its header says 16'),
    (GOOD, 17, 'has 17 bytes of tensors'),
    (GOOD | dict(a=entry(0, 8, [3])), 16, 'a has 8 bytes, its dtype and shape say 12'),
    (GOOD | dict(a=entry(0, 8, [2], 'F64')), 16, 'a has 8 bytes, its dtype and shape say 16'),
    (GOOD | dict(b=entry(4, 12, [2])), 16, 'b begins at byte 4, expected 8'),
    (GOOD | dict(b=entry(12, 20, [2])), 20, 'b begins at byte 12'),
    (GOOD | dict(a=entry(8, 0, [2])), 16, 'no dtype, shape and data_offsets of a'),
    (GOOD | dict(a=entry(-8, 0, [2])), 16, 'data_offsets of a'),
    (GOOD | dict(a=entry(0, 8, [-2])), 16, 'data_offsets of a'),
    (GOOD | dict(a=entry(0, 8, [True, 2])), 16, 'data_offsets of a'),
    (GOOD | dict(a=entry(0, 8., [2])), 16, 'data_offsets of a'),
    (GOOD | dict(a=entry(0, 8, 2)), 16, 'data_offsets of a'),
    (GOOD | dict(a=dict(dtype='F32', shape=[2])), 16, 'data_offsets of a'),
    (GOOD | dict(a=7), 16, 'data_offsets of a'),
    (GOOD | dict(a=entry(0, 8, [2], 32)), 16, 'data_offsets of a'),
    (GOOD | dict(a=entry(0, 2 ** 60, [2 ** 58])), 16, 'b begins at byte 8'),
    (GOOD | dict(a=entry(0, 8, [2] + [1] * 64)), 16, 'a has a shape that no array can have'),
    (GOOD | dict(a=entry(0, 0, [0, 2 ** 62])), 16, 'a has a shape that no array can have'),
    (b'{"a": 1, "a": 2}', 0, 'it names a twice'),
    (b'[1, 2]', 0, 'its header is a list'),
    (b'{"a": ', 0, 'its header: Expecting value'),
    (b'\xff\xfe\x00\x00', 0, 'its header:'),
    (b'[' * 100_000, 0, 'its header:'),
])
def test_a_header_that_lies_is_refused(tmp_path, header, size, words):
  write(tmp_path / 'model.safetensors', header, bytes(size))
  refused(tmp_path, 'model.safetensors', 'cannot be read', words, 'download it again')
  # Their package takes a dtype that is a number, and more axes than NumPy has.
  if header != GOOD | dict(a=entry(0, 8, [2], 32)) and 'no array' not in words:
    with pytest.raises((safetensors.SafetensorError, UnicodeDecodeError)):
      safetensors.safe_open(tmp_path / 'model.safetensors', framework='numpy')


@pytest.mark.parametrize('length', [0, 1, 10 ** 6, 2 ** 40, 2 ** 64 - 1])
def test_a_length_of_the_header_that_cannot_be_is_refused(tmp_path, length):
  write(tmp_path / 'model.safetensors', GOOD, bytes(16), length)
  refused(tmp_path, 'do not hold a header', 'download it again')


def test_every_truncation_is_refused(tmp_path):
  folder = folder_of(tmp_path, a=np.ones(3, np.float32), b=np.ones((2, 2), np.float16))
  text = (folder / 'model.safetensors').read_bytes()
  for keep in range(len(text)):
    (folder / 'model.safetensors').write_bytes(text[:keep])
    refused(folder, 'model.safetensors', 'cannot be read')


def test_a_file_cut_short_while_it_is_read_is_told(tmp_path):
  folder = folder_of(tmp_path, a=np.ones(3000, np.float32))
  with opened(folder) as found:
    os.truncate(folder / 'model.safetensors', 4000)
    with pytest.raises(InputError, match='ends within a; download'):
      found['a'].read()


def test_kinds_that_are_no_floats_are_there_to_be_named(tmp_path):
  folder = folder_of(tmp_path, a=np.ones(3, np.int8), b=np.ones(2, bool))
  write(tmp_path / 'model.safetensors', dict(
      a=entry(0, 3, [3], 'I8'), b=entry(3, 5, [2], 'BOOL'), c=entry(5, 9, [16], 'F2_OF_LATER')),
        bytes(9))
  with opened(folder) as found:
    assert {n: t.kind for n, t in found.items()} == dict(a='I8', b='BOOL', c='F2_OF_LATER')


def sharded(folder, files, weight_map):
  folder.mkdir(exist_ok=True)
  for file, arrays in files.items():
    safetensors.numpy.save_file(arrays, folder / file)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=weight_map)))


def test_tensors_are_those_of_all_files_of_the_index(tmp_path):
  one, two = np.ones(3, np.float32), np.zeros((2, 2), np.float16)
  sharded(tmp_path, {'1.safetensors': dict(a=one), '2.safetensors': dict(b=two),
                     'stale.safetensors': dict(a=two)},
          dict(a='1.safetensors', b='2.safetensors'))
  with opened(tmp_path) as found:
    np.testing.assert_array_equal(found['a'].read(), one)
    np.testing.assert_array_equal(found['b'].read(), two)
    assert found.keys() == {'a', 'b'}


@pytest.mark.parametrize('file', ['../1.safetensors', '/etc/passwd', 'x/1.safetensors', '..', '.',
                                  '', 'x\\1.safetensors', '1.safetensors\0', 7, None])
def test_an_index_cannot_name_files_elsewhere(tmp_path, file):
  safetensors.numpy.save_file(dict(a=np.ones(1)), tmp_path / '1.safetensors')
  sharded(tmp_path / 'in', {}, dict(a=file))
  refused(tmp_path / 'in', 'no weight_map of file names', 'download')


def test_an_index_that_is_not_true_is_refused(tmp_path):
  arrays = dict(a=np.ones(1, np.float32), b=np.ones(1, np.float32))
  both = {'1.safetensors': dict(a=arrays['a']), '2.safetensors': dict(b=arrays['b'])}
  sharded(tmp_path, both, dict(a='1.safetensors', b='1.safetensors', c='2.safetensors'))
  refused(tmp_path, 'lacks tensors where its index has them', 'b (1.safetensors)',
          'c (2.safetensors)')
  sharded(tmp_path, both | {'2.safetensors': arrays}, dict(a='1.safetensors', b='2.safetensors'))
  refused(tmp_path, 'in two files', 'a (1.safetensors and 2.safetensors)')
  sharded(tmp_path, {}, dict(a='1.safetensors', b='2.safetensors', x='3.safetensors'))
  refused(tmp_path, 'lacks 3.safetensors', 'download')
  (tmp_path / '3.safetensors').mkdir()
  refused(tmp_path, 'lacks 3.safetensors')
  sharded(tmp_path, {}, {})
  refused(tmp_path, 'no weight_map')


MADE = {'b': np.ones((3, 5), ml_dtypes.bfloat16), 'a': RNG.normal(size=7).astype(np.float32),
        'empty': np.ones((0, 2), np.float16), 'c': RNG.normal(size=(2, 3)).astype(np.float16),
        'scalar': np.float64(3.)}
WANTED = {name: (x.shape, x.dtype) for name, x in MADE.items()}


def test_what_we_write_their_package_reads(tmp_path):
  shards.write(tmp_path, WANTED, lambda name: MADE[name], 10 ** 9)
  assert [path.name for path in tmp_path.iterdir()] == ['model.safetensors']
  theirs = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert theirs.keys() == MADE.keys()
  for name, array in MADE.items():
    np.testing.assert_array_equal(theirs[name], array, strict=True)
  with opened(tmp_path) as found:
    assert all(t.start % t.dtype.itemsize == 0 for t in found.values())
  with safetensors.safe_open(tmp_path / 'model.safetensors', framework='numpy') as file:
    assert file.metadata() == dict(format='pt')


@pytest.mark.parametrize('most', [1, 28, 30, 58])
def test_files_are_no_larger_than_asked_but_for_one_tensor(tmp_path, most):
  shards.write(tmp_path, WANTED, lambda name: MADE[name], most)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  files = sorted(path.name for path in tmp_path.glob('*.safetensors'))
  assert files == [f'model-{k + 1:05}-of-{len(files):05}.safetensors' for k in range(len(files))]
  assert index['metadata']['total_size'] == sum(x.nbytes for x in MADE.values())
  read = {}
  for file in files:
    own = safetensors.numpy.load_file(tmp_path / file)
    assert len([x for x in own.values() if x.size]) == 1 or (
        sum(x.nbytes for x in own.values()) <= most)
    assert own.keys() == {name for name, where in index['weight_map'].items() if where == file}
    read |= own
  with opened(tmp_path) as found:
    for name, array in MADE.items():
      np.testing.assert_array_equal(read[name], array, strict=True)
      np.testing.assert_array_equal(found[name].read(), array, strict=True)


@pytest.mark.parametrize(('size', 'expected'), [
    (1, 1), ('5GB', 5 * 10 ** 9), ('300MB', 3 * 10 ** 8), ('1.5 KB', 1500)])
def test_sizes_are_bytes_or_have_units(size, expected):
  assert shards.nbytes(size) == expected


@pytest.mark.parametrize('size', [
    0, -5, True, 1.5, None, '', '5', 'GB', '-5GB', '5 gb', '0GB', '5GiB'])
def test_what_is_no_size_is_refused(size):
  with pytest.raises(InputError, match='max_shard_size'):
    shards.nbytes(size)
