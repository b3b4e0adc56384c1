"""Arrays filled from the tensors of a checkpoint, a block at a time, where they will live."""
import concurrent.futures
import math
import mmap
import os

import jax
import numpy as np

from lean_jax.interop.tensors import common, halves, whole, within

_LINE = 64                    # bytes, of a cache
_THREADS = min(8, os.cpu_count() or 1)     # tensors read at once, a few blocks of each in memory


def filled(shape, dtype, sharding, stored, pieces, odd):
  """An array made of tensors, of which a host reads what its devices need.

  On a CPU the memory that is filled is the array's own; of other devices the host holds this
  array's part for as long as it takes to send.

  Args:
    shape, dtype: of the array.
    sharding: where it lives; None is JAX's default device.
    stored: the Stored that says how tensors have it.
    pieces: [(tensor, at)], the Tensor of `array[at]`; None is zeros.
    odd: a set, to which the names of tensors with a NaN or an infinity are added.
  """
  shape = tuple(shape)
  boxes = {None: whole(shape)} if sharding is None else {
      device: tuple(s.indices(n)[:2] for s, n in zip(index, shape))
      for device, index in sharding.addressable_devices_indices_map(shape).items()}
  shards = {box: _pages([b - a for a, b in box], dtype) for box in set(boxes.values())}
  threads = _THREADS if _in_boxes(stored) else 1       # other tensors are whole in memory
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(lambda piece: _fill(shards, shape[len(piece[1]):], stored, *piece, odd), pieces))
  if sharding is None:
    return jax.device_put(shards[boxes[None]])
  return jax.make_array_from_single_device_arrays(shape, sharding, [
      jax.device_put(shards[box], jax.sharding.SingleDeviceSharding(
          device, memory_kind=sharding.memory_kind)) for device, box in boxes.items()])


def _fill(shards, shape, stored, tensor, at, odd):
  """Writes one piece, of this shape, into the shards that have a part of it."""
  depth = len(at)
  wanted = {box[depth:]: values[(*(n - a for n, (a, _) in zip(at, box)), ...)]
            for box, values in shards.items() if all(a <= n < b for n, (a, b) in zip(at, box))}
  if tensor is None:
    for out in wanted.values():
      out[...] = 0
    return
  if not wanted:
    return
  hull = tuple((min(a for a, _ in pairs), max(b for _, b in pairs)) for pairs in zip(*wanted))
  dtype = next(iter(wanted.values())).dtype
  for box, values in _blocks(tensor, stored, shape, hull, dtype):
    if not _finite(values):
      odd.add(tensor.name)
    for own, out in wanted.items():
      here = common(own, box)
      if here is not None:
        out[within(here, own)] = values[within(here, box)]


def _blocks(tensor, stored, shape, box, dtype):
  """[(box, array)] of the parts of ours, of this shape, that make up a box."""
  if not _in_boxes(stored):
    values = stored.read(tensor.read(), shape)
    yield from ((part, _converted(values[within(part, whole(shape))], dtype))
                for part in halves(box))
    return
  permute = stored.permute or tuple(range(len(shape)))
  theirs = [box[permute.index(k)] for k in range(len(shape))]
  before = sum(stored.sizes[:stored.index])            # 0 where ours is the whole tensor
  move = lambda pairs, by: tuple(
      (a + by, b + by) if k == stored.axis else (a, b) for k, (a, b) in enumerate(pairs))
  for part, values in tensor.blocks(move(theirs, before)):
    part = move(part, -before)
    yield tuple(part[k] for k in permute), _converted(values, dtype).transpose(permute)


def _in_boxes(stored):
  """Whether a box of our array is a box of the tensor."""
  return stored.shape is None and stored.repeats == 1


def _converted(values, dtype):
  """Values in a dtype, its rows an odd number of cache lines apart.

  They will be transposed, and the rows of a matrix whose width is a power of two are at the same
  place of a cache: that takes several times as long.
  """
  if values.ndim < 2:
    out = np.empty(values.shape, dtype)
  else:
    *rows, width = values.shape
    lines = -(-width * dtype.itemsize // _LINE) | 1
    out = np.empty((*rows, lines * _LINE // dtype.itemsize), dtype)[..., :width]
  with np.errstate(over='ignore'):                     # told with the other infinities
    out[...] = values
  return out


def _finite(values):
  """Whether there is no NaN and no infinity; of two bytes by their exponents, several times faster.
  """
  if values.dtype.itemsize != 2:
    return bool(np.isfinite(values).all())
  exponent = np.uint16(0x7c00 if values.dtype == np.float16 else 0x7f80)
  return not ((values.view(np.uint16) & exponent) == exponent).any()


def _pages(shape, dtype):
  """An array in memory of its own, which JAX takes over on a CPU because it begins with a page.

  NumPy would ask for huge pages, and to be given those took longer than all the rest.
  """
  size = math.prod(shape) * np.dtype(dtype).itemsize
  room = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(room, np.uint8, size).view(dtype).reshape(shape)
