"""What an array holds, in 64 bits: equal on any mesh, different after any flipped bit.

Of each element the bits b and the row-major position p, in 32-bit arithmetic that wraps:
h = mix(b ^ 0x9E3779B1 p); the digest is (sum of h, sum of (2 floor(p / 2) + 1) h). Sums commute,
so that sharding does not matter; mix and the odd factor are invertible, so that a change of one
element always shows. Shape and dtype are not part of it: a description holds those.
"""
import concurrent.futures
import hashlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.tree import named_arrays

_CHUNK = 1 << 15                                       # elements; the temporaries stay in the cache
_PIECE = 1 << 18                                       # of a thread
_POSITION, _FIRST, _SECOND = (np.uint32(c) for c in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def digest(tree):
  """{name: 16 hexadecimal digits} of all arrays of a tree, those inside weights included.

  Arrays of this host's CPU are read where they are, without compiling anything; others on their
  devices, by one small program for each shape and sharding.
  """
  arrays = named_arrays(tree)
  sums = {name: _device_sums(x) for name, x in arrays.items() if not _on_host(x)}   # begun
  with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
    sums |= {name: _host_sums(x, pool) for name, x in arrays.items() if name not in sums}
  sums = {name: sums[name] for name in arrays}
  return {name: '{:08x}{:08x}'.format(*map(int, pair))
          for name, pair in jax.device_get(sums).items()}


def fingerprint(tree):
  """16 hexadecimal digits of a whole tree: names, shapes, dtypes and digests of its arrays."""
  digests = digest(tree)
  lines = [(n, list(x.shape), str(x.dtype), digests[n]) for n, x in named_arrays(tree).items()]
  return hashlib.sha256(json.dumps(sorted(lines)).encode()).hexdigest()[:16]


def _is_key(x):
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _on_host(x):
  if not isinstance(x, jax.Array):
    return True
  return x.is_fully_addressable and all(d.platform == 'cpu' for d in x.sharding.device_set)


def _bits_dtype(dtype):
  return {1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32)


@jax.jit
def _device_sums(x):
  """Sums of one array; the formula as it is above."""
  bits, position = _device_bits(x)
  h = (bits ^ (position * _POSITION)) * _FIRST
  h = (h ^ (h >> np.uint32(13))) * _SECOND
  h = h ^ (h >> np.uint32(16))
  total = lambda y: jnp.sum(y, dtype=jnp.uint32)
  return total(h), total(h * (position | np.uint32(1)))


def _device_bits(x):
  """Bits and positions of all elements."""
  x = jax.random.key_data(x) if _is_key(x) else x
  if x.dtype in (jnp.int4, jnp.int2):
    x = x.astype(jnp.int8)
  if x.dtype in (jnp.uint4, jnp.uint2, jnp.bool_):
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, _bits_dtype(x.dtype)).astype(jnp.uint32)
  position = jnp.zeros(bits.shape, jnp.uint32)
  for axis, n in enumerate(bits.shape):
    here = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    position = position * np.uint32(n & 0xFFFFFFFF) + here
  return bits, position


def _host_sums(x, pool):
  """Sums of one array, on all cores: NumPy lets go of Python's lock meanwhile."""
  bits = _host_bits(x)
  work = lambda start: _piece_sums(bits[start:start + _PIECE], start)
  found = (pool.map if bits.size > _PIECE else map)(work, range(0, bits.size, _PIECE))
  return sum(found, np.zeros(2, np.uint32))


def _host_bits(x):
  x = np.asarray(jax.random.key_data(x) if isinstance(x, jax.Array) and _is_key(x) else x)
  if x.dtype in (jnp.int4, jnp.int2):
    x = x.astype(np.int8)
  if x.dtype in (jnp.uint4, jnp.uint2):
    x = x.astype(np.uint8)
  x = np.ascontiguousarray(x).reshape(-1)
  return x.view(_bits_dtype(x.dtype))


def _piece_sums(bits, first):
  """The sums of bits at positions from `first`, an even one; `_device_sums` without temporaries."""
  wrap = lambda n: np.uint32(n & 0xFFFFFFFF)
  position = np.arange(min(_CHUNK, bits.size), dtype=np.uint32)
  times, odd = position * _POSITION, position | np.uint32(1)
  h, g = np.empty_like(position), np.empty_like(position)
  one = other = 0
  for start in range(0, bits.size, _CHUNK):
    b = bits[start:start + _CHUNK]
    n, at = b.size, first + start
    x, y = h[:n], g[:n]
    np.add(times[:n], wrap(at * int(_POSITION)), out=y)
    np.bitwise_xor(b, y, out=x)
    np.multiply(x, _FIRST, out=x)
    np.right_shift(x, np.uint32(13), out=y)
    np.bitwise_xor(x, y, out=x)
    np.multiply(x, _SECOND, out=x)
    np.right_shift(x, np.uint32(16), out=y)
    np.bitwise_xor(x, y, out=x)
    total = int(np.sum(x, dtype=np.uint32))
    one += total
    other += int(np.dot(x, odd[:n])) + at * total      # (at + position) | 1, at being even
  return np.array([wrap(one), wrap(other)])
