"""What an array holds, in 64 bits: equal on any mesh, different after any flipped bit.

Of each element the bits b and the row-major position p, in 32-bit arithmetic that wraps:
h = mix(b ^ 0x9E3779B1 p); the digest is (sum of h, sum of (2 floor(p / 2) + 1) h). Sums commute,
so that sharding does not matter; mix and the odd factor are invertible, so that a change of one
element always shows. Shape and dtype are not part of it: a description holds those.
"""
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.tree import named_arrays

_CHUNK = 1 << 16                                       # elements; the temporaries stay in the cache
_POSITION, _FIRST, _SECOND = (np.uint32(c) for c in (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35))


def digest(tree):
  """{name: 16 hexadecimal digits} of all arrays of a tree, those inside weights included.

  Arrays of this host's CPU are read where they are, without compiling anything; others on their
  devices, by one small program for each shape and sharding.
  """
  sums = {name: _host_sums(x) if _on_host(x) else _device_sums(x)
          for name, x in named_arrays(tree).items()}
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
  return _sums(jnp, _device_bits(x))


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


def _host_sums(x):
  x = np.asarray(jax.random.key_data(x) if isinstance(x, jax.Array) and _is_key(x) else x)
  if x.dtype in (jnp.int4, jnp.int2):
    x = x.astype(np.int8)
  if x.dtype in (jnp.uint4, jnp.uint2):
    x = x.astype(np.uint8)
  x = np.ascontiguousarray(x).reshape(-1)
  flat = x.view(_bits_dtype(x.dtype))
  totals = np.zeros(2, np.uint32)
  for start in range(0, flat.size, _CHUNK):
    bits = flat[start:start + _CHUNK].astype(np.uint32)
    position = np.arange(bits.size, dtype=np.uint32) + np.uint32(start & 0xFFFFFFFF)
    totals += np.array(_sums(np, (bits, position)), np.uint32)
  return totals


def _sums(xp, bits_and_position):
  bits, position = bits_and_position
  h = (bits ^ (position * _POSITION)) * _FIRST
  h = (h ^ (h >> np.uint32(13))) * _SECOND
  h = h ^ (h >> np.uint32(16))
  return (xp.sum(h, dtype=np.uint32), xp.sum(h * (position | np.uint32(1)), dtype=np.uint32))
