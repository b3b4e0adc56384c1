import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lean_jax.training import digest as module
from lean_jax.training.digest import digest, fingerprint
from lean_jax.weights import Dense

DTYPES = ('float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e5m2', 'int8', 'uint8', 'int4',
          'uint4', 'int2', 'int32', 'uint32', 'bool')
SMALL = {'int4': np.int8, 'int2': np.int8, 'uint4': np.uint8, 'bool': np.uint8}


def from_bits(bits, dtype):
  """An array whose elements have the given low bits."""
  if dtype in SMALL:
    return jnp.asarray(bits.astype(SMALL[dtype])).astype(dtype)
  size = jnp.dtype(dtype).itemsize
  return jnp.asarray(bits.astype(f'uint{8 * size}').view(jnp.dtype(dtype)))


def width(dtype):
  return {'int4': 3, 'uint4': 4, 'int2': 1, 'bool': 1}.get(dtype, 8 * jnp.dtype(dtype).itemsize)


@pytest.fixture(scope='module')
def trees():
  """Arrays of every dtype, and their bits."""
  rng = np.random.default_rng(0)
  bits = {d: rng.integers(0, 2 ** width(d), (5, 7), dtype=np.uint64) for d in DTYPES}
  return bits, {d: from_bits(b, d) for d, b in bits.items()}


def test_host_and_device_compute_the_same(trees, monkeypatch):
  tree = trees[1] | {'key': jax.random.key(3), 'keys': jax.random.split(jax.random.key(0), 3),
                     'scalar': jnp.float32(2), 'empty': jnp.zeros((0, 3)),
                     'long': jnp.arange(70000, dtype=jnp.int32).reshape(7, 10000)}
  host = digest(tree)
  monkeypatch.setattr(module, '_on_host', lambda x: False)
  assert digest(tree) == host


def test_long_arrays_are_read_in_pieces_as_they_are_on_a_device(monkeypatch):
  long = jnp.asarray(np.random.default_rng(0).integers(0, 256, 300_001), jnp.uint8)
  tree = dict(bytes=long, halves=long[:-1].view(jnp.bfloat16), words=long[:-1].view(jnp.float32))
  monkeypatch.setattr(module, '_PIECE', 1 << 16)
  host = digest(tree)
  monkeypatch.setattr(module, '_on_host', lambda x: False)
  assert digest(tree) == host


def by_hand(values):
  """The digest of a list of 32-bit integers, by the formula, in integers that do not wrap."""
  one = other = 0
  for p, b in enumerate(values):
    h = (b ^ (0x9E3779B1 * p % 2 ** 32)) * 0x85EBCA6B % 2 ** 32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2 ** 32
    h ^= h >> 16
    one, other = one + h, other + (2 * (p // 2) + 1) * h
  return f'{one % 2 ** 32:08x}{other % 2 ** 32:08x}'


def test_it_is_the_formula():
  values = np.random.default_rng(0).integers(0, 2 ** 32, 70_001).astype(np.uint32)
  assert digest(dict(x=values))['x'] == by_hand(values.tolist())


def test_one_flipped_bit_always_shows(trees):
  bits, tree = trees
  before = digest(tree)
  for dtype, b in bits.items():
    for bit in range(width(dtype)):
      for place in (0, 17, 34):
        flipped = b.copy()
        flipped.reshape(-1)[place] ^= np.uint64(1 << bit)
        assert digest({dtype: from_bits(flipped, dtype)})[dtype] != before[dtype]


def test_exchanged_elements_and_other_keys_show():
  x = np.arange(64, dtype=np.float32)
  y = x.copy()
  y[[3, 9]] = y[[9, 3]]
  assert digest({'x': x}) != digest({'x': y})
  assert digest({'x': jax.random.key(1)}) != digest({'x': jax.random.key(2)})


@pytest.mark.parametrize('where', ['host', 'device'])
def test_same_on_any_mesh(where, monkeypatch):
  if where == 'device':
    monkeypatch.setattr(module, '_on_host', lambda x: False)
  rng = np.random.default_rng(0)
  tree = {'f': jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
          'q': jnp.asarray(rng.integers(-8, 8, (8, 16)), jnp.int4)}
  alone = digest(tree)
  for shape, spec in (((8, 1), ('x',)), ((4, 2), ('x', 'y')), ((2, 4), ('y', 'x'))):
    mesh = jax.make_mesh(shape, ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    assert digest(jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))) == alone


def test_names_are_those_of_arrays_inside_weights():
  tree = {'up': {'kernel': Dense(jnp.ones((2, 3)), 'io', (None, None))}, 'none': None}
  assert list(digest(tree)) == ['up/kernel/value']


def test_fingerprint_tells_names_shapes_and_dtypes_apart():
  zero = jnp.zeros((2, 3))
  trees = ({'a': zero}, {'b': zero}, {'a': zero.reshape(3, 2)}, {'a': zero.astype(jnp.int32)}, {})
  assert len({fingerprint(t) for t in trees}) == len(trees)
  assert fingerprint({'a': zero, 'b': zero}) == fingerprint({'b': zero, 'a': zero})
