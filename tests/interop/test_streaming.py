"""Arrays filled from files are what reading whole tensors gives, wherever they live."""
import contextlib
import itertools
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lean_jax.interop import streaming, tensors
from lean_jax.models.families.base import Stored, linear, parts
from lean_jax.training.mesh import make_mesh

RNG = np.random.default_rng(0)
# Of an array of ours [8 6] of one layer: what a tensor can be, and our sizes.
KINDS = dict(
    plain=Stored('x'), transposed=linear('x'),
    first=parts('x', (8, 3), of=Stored)[0], last=parts('x', (5, 8), of=Stored)[1],
    columns=parts('x', (4, 6, 1), of=Stored, axis=1)[1], outputs=parts('x', (1, 6), of=linear)[1],
    repeated=parts('x', (2, 1), of=Stored, repeats=4)[0],
    interleaved=parts('x', (1, 1), of=Stored, axis=1, repeats=6)[1],
    spread=Stored('x', shape=(8, 1, 6)), turned=Stored('x', permute=(0, 2, 1), shape=(8, 6, 1)))
OURS = (8, 6)


def stored_as(stored, count, dtype, folder, stack):
  """`count` random tensors of a kind: the open Tensors, and the arrays of ours that they are."""
  arrays = [RNG.normal(size=stored.tensor_shape(OURS)).astype(dtype) for _ in range(count)]
  safetensors.numpy.save_file({str(k): x for k, x in enumerate(arrays)},
                              folder / 'model.safetensors')
  found = tensors.opened(folder, stack)
  return [found[str(k)] for k in range(count)], [stored.read(x, OURS) for x in arrays]


def places():
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  specs = [(), (None, 'fsdp'), ('data', 'tensor', 'fsdp'), (None, ('data', 'fsdp'), 'tensor'),
           ('tensor',)]
  return [None, SingleDeviceSharding(jax.devices()[3]),
          *(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)]


@pytest.mark.parametrize('kind', KINDS)
def test_layers_are_stacked_wherever_they_live(tmp_path, kind):
  stored = KINDS[kind]
  with contextlib.ExitStack() as stack:
    found, wanted = stored_as(stored, 4, np.float32, tmp_path, stack)
    for sharding in places():
      array = streaming.filled((4, *OURS), np.dtype('float32'), sharding, stored,
                               [(t, (k,)) for k, t in enumerate(found)], set())
      np.testing.assert_array_equal(array, np.stack(wanted), strict=True)
      assert sharding is None or array.sharding == sharding
      assert array.committed == (sharding is not None)


def test_layers_and_experts_and_what_is_absent(tmp_path):
  at = list(itertools.product(range(2), range(4)))
  with contextlib.ExitStack() as stack:
    found, wanted = stored_as(linear('x'), 8, ml_dtypes.bfloat16, tmp_path, stack)
    wanted[2] = np.zeros_like(wanted[2])
    pieces = [(None if k == 2 else t, at[k]) for k, t in enumerate(found)]
    for sharding in places():
      array = streaming.filled((2, 4, *OURS), np.dtype('float32'), sharding, linear('x'), pieces,
                               set())
      np.testing.assert_array_equal(array, np.stack(wanted).reshape(2, 4, *OURS).astype('float32'))


def test_an_array_of_no_layer_and_scalars(tmp_path):
  arrays = dict(x=RNG.normal(size=(5, 3)).astype(np.float16), y=np.array(2., np.float32))
  safetensors.numpy.save_file(arrays, tmp_path / 'model.safetensors')
  with contextlib.ExitStack() as stack:
    found = tensors.opened(tmp_path, stack)
    one = streaming.filled((5, 3), np.dtype('float16'), None, Stored('x'), [(found['x'], ())],
                           set())
    np.testing.assert_array_equal(one, arrays['x'])
    two = streaming.filled((), np.dtype('float32'), None, Stored('y'), [(found['y'], ())], set())
    three = streaming.filled((2,), np.dtype('float32'), None, Stored('y'),
                             [(found['y'], (k,)) for k in range(2)], set())
  assert two == 2 and three.tolist() == [2, 2]


@pytest.mark.parametrize('big', [True, False])
def test_a_host_reads_what_its_devices_hold(tmp_path, monkeypatch, big):
  """Rows of a file, of which a device holds some; and columns, if a row of them is not short."""
  shape = (6, 4 * tensors.RUN) if big else (600, 8)
  array = RNG.integers(0, 9, shape).astype(np.float32)
  safetensors.numpy.save_file(dict(x=array), tmp_path / 'model.safetensors')
  read, preadv = [], os.preadv
  monkeypatch.setattr(os, 'preadv', lambda file, buffers, at: read.append(
      sum(len(b) for b in buffers)) or preadv(file, buffers, at))
  with contextlib.ExitStack() as stack:
    found = tensors.opened(tmp_path, stack)['x']
    for stored, turned in ((Stored('x'), array), (linear('x'), array.T)):
      for axis in (0, 1):
        box = [(0, n) for n in turned.shape]
        box[axis] = (n := turned.shape[axis]) // 2, n
        out = np.zeros([b - a for a, b in box], np.float32)
        read.clear()
        streaming._fill({tuple(box): out}, turned.shape, stored, found, (), set())
        np.testing.assert_array_equal(out, turned[tensors.within(box, tensors.whole(turned.shape))])
        rows = (axis == 0) == (stored.permute is None)
        assert sum(read) == array.nbytes // (2 if rows or big else 1)


def test_a_layer_that_no_device_of_this_host_has_is_not_read(tmp_path, monkeypatch):
  with contextlib.ExitStack() as stack:
    found, wanted = stored_as(Stored('x'), 2, np.float32, tmp_path, stack)
    out = np.zeros((1, *OURS), np.float32)
    shards = {((1, 2), *tensors.whole(OURS)): out}
    monkeypatch.setattr(tensors.Tensor, '_read', None)
    streaming._fill(shards, OURS, Stored('x'), found[0], (0,), set())
    monkeypatch.undo()
    streaming._fill(shards, OURS, Stored('x'), found[1], (1,), set())
  np.testing.assert_array_equal(out[0], wanted[1])


def test_on_a_cpu_what_is_filled_is_the_array_itself(tmp_path, monkeypatch):
  made, pages = [], streaming._pages
  monkeypatch.setattr(streaming, '_pages', lambda *a: made.append(pages(*a)) or made[-1])
  with contextlib.ExitStack() as stack:
    found, _ = stored_as(Stored('x'), 1, np.float32, tmp_path, stack)
    for sharding in places()[:4]:
      made.clear()
      array = streaming.filled(OURS, np.dtype('float32'), sharding, Stored('x'), [(found[0], ())],
                               set())
      assert {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards} == {
          x.ctypes.data for x in made}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize(('value', 'to'), [
    (np.nan, ()), (np.inf, ()), (-np.inf, ()), (7e4, ('float16',)), (1., ())])
def test_values_that_are_not_finite_are_noticed(tmp_path, dtype, value, to):
  x = np.ones((3, 700), np.float32)
  x[2, 650] = value
  safetensors.numpy.save_file(dict(x=x, y=np.ones((3, 700))), tmp_path / 'model.safetensors')
  odd = set()
  with contextlib.ExitStack() as stack:
    found = tensors.opened(tmp_path, stack)
    streaming.filled((2, 700, 3), np.dtype(getattr(ml_dtypes, dtype, dtype)), None, linear('x'),
                     [(found[n], (k,)) for k, n in enumerate('xy')], odd)
  assert odd == ({'x'} if not np.isfinite(value) or dtype in to else set())
