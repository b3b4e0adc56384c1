"""Products with sharded weights: the unsharded ones, and bytes are what is gathered."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.native import library
from lean_jax.kernels.platforms import sharded
from lean_jax.kernels.platforms.sharded import Axes
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.quantization import formats
from lean_jax.quantization.packing import pack
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import parse_spec
from lean_jax.training.mesh import make_mesh, on, shardings
from lean_jax.weights import Dense
from lean_jax.weights.prepared import Prepared

AXES = {'column': Axes(M='data', N='tensor'), 'row': Axes(M='data', K='tensor'),
        'fsdp': Axes(M=('data', 'fsdp'), fsdp='fsdp'),
        'column, fsdp': Axes(M=('data', 'fsdp'), N='tensor', fsdp='fsdp'),
        'row, fsdp': Axes(M=('data', 'fsdp'), K='tensor', fsdp='fsdp')}


@functools.lru_cache
def mesh():
  return make_mesh(data=2, fsdp=2, tensor=2)


def operands(group=None, ones=False):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 64)).astype(np.float32)
  values = rng.integers(-127, 128, (64, 12)).astype(np.int8)
  scale = np.ones if ones else functools.partial(rng.uniform, .01, .1)
  scale = scale(size=(64 // group if group else 1, 12)) if not ones else np.ones((1, 12))
  return jnp.asarray(x), jnp.asarray(values), jnp.asarray(scale, jnp.float32)


def weights(scheme):
  spec = parse_spec(scheme)
  x, _, _ = operands()
  w = jax.random.normal(jax.random.key(0), (64, 12))
  codes, scale, zero = formats.quantize(w, spec)
  return x, pack(codes, spec.bits), scale, zero, spec


@pytest.mark.parametrize('axes', AXES.values(), ids=AXES)
def test_integers_of_a_sharded_product_are_those_of_the_unsharded_one(axes):
  x, values, scale = operands(ones=True)
  x = x.at[3, 60].set(jnp.nan)
  got = jax.jit(lambda *a: sharded.int8_matmul(*a, mesh(), axes))(x, values, scale)
  want = jax.jit(int8.int8_matmul)(x, values, scale)
  step = np.nanmax(np.abs(x), axis=1, keepdims=True) / 127
  whole = np.arange(8) != 3
  # sums of 64 products are below 2^24: float32 holds them, and dividing by the step gives them back
  np.testing.assert_array_equal(np.rint((got / step)[whole]), np.rint((want / step)[whole]))
  np.testing.assert_allclose(got, want, rtol=2. ** -22)          # a product's last bits
  assert np.isnan(got).all(1).tolist() == [k == 3 for k in range(8)]


@pytest.mark.parametrize('group', [None, 16])
@pytest.mark.parametrize('axes', AXES.values(), ids=AXES)
def test_a_sharded_int8_product_and_its_gradients_are_the_unsharded_ones(axes, group):
  x, values, scale = operands(group)
  g = jax.random.normal(jax.random.key(1), (8, 12))
  ours = lambda x, s: sharded.int8_matmul(x, values, s, mesh(), axes, group=group)
  plain = lambda x, s: int8.int8_matmul(x, values, s, group=group)
  both = [jax.jit(jax.value_and_grad(lambda x, s, f=f: jnp.sum(g * f(x, s)), (0, 1)))(x, scale)
          for f in (ours, plain)]
  for got, want in zip(*map(jax.tree.leaves, both)):
    # sums of at most 64 float32 terms, in another order
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize('scheme', ['w8a16', 'w4a16-g16', 'w4a16-g16-asym', 'w4a16-tensor'])
@pytest.mark.parametrize('axes', AXES.values(), ids=AXES)
def test_a_sharded_weight_only_product_and_its_gradients_are_the_unsharded_ones(axes, scheme):
  x, values, scale, zero, spec = weights(scheme)
  g = jax.random.normal(jax.random.key(1), (8, 12))
  ours = lambda x, s: sharded.weight_only_matmul(x, values, s, zero, spec, mesh(), axes)
  plain = lambda x, s: weight_only.weight_only_matmul(x, values, s, zero, spec)
  both = [jax.jit(jax.value_and_grad(lambda x, s, f=f: jnp.sum(g * f(x, s)), (0, 1)))(x, scale)
          for f in (ours, plain)]
  for got, want in zip(*map(jax.tree.leaves, both)):
    # sums of at most 64 terms in another order; gradients of bfloat16 scales round each part's sum
    near = 2. ** -7 if got.dtype == jnp.bfloat16 else 1e-5
    got, want = (np.asarray(a, np.float32) for a in (got, want))
    np.testing.assert_allclose(got, want, rtol=near, atol=near * float(np.abs(want).max()))


def test_one_step_for_all_rows_is_that_of_the_unsharded_product():
  x, values, scale = operands()
  how = dict(x_scale=jnp.asarray(.02))
  got = sharded.int8_matmul(x, values, scale, mesh(), AXES['row, fsdp'], **how)
  np.testing.assert_allclose(got, int8.int8_matmul(x, values, scale, **how), rtol=1e-5, atol=1e-4)


def test_what_is_gathered_are_the_packed_bytes():
  axes = AXES['fsdp']
  x, values, scale, zero, spec = weights('w4a16-g16')
  put = lambda a, *at: jax.device_put(a, NamedSharding(mesh(), PartitionSpec(*at)))
  given = put(x, ('data', 'fsdp')), put(values, 'fsdp'), put(scale, 'fsdp')
  run = jax.jit(lambda x, v, s: sharded.weight_only_matmul(x, v, s, zero, spec, mesh(), axes))
  moved = gathered(run.lower(*given).compile().as_text())
  assert ('u8', '32,12') in moved                     # 64 rows, two codes a byte
  assert all(kind == 'u8' or shape == '4,12' for kind, shape in moved)     # and scales
  x, values, scale = operands()
  given = put(x, ('data', 'fsdp')), put(values, 'fsdp'), put(scale)
  run = jax.jit(lambda *a: sharded.int8_matmul(*a, mesh(), axes))
  assert set(gathered(run.lower(*given).compile().as_text())) == {('s8', '64,12')}


def gathered(text):
  """(dtype, shape) of each array that a program gathers."""
  return re.findall(r'= (\w+)\[([\d,]*)\]\S* all-gather\(', text)


@pytest.mark.parametrize(('axes', 'match'), [
    (Axes(K='tensor', N='tensor'), "'tensor' is given twice"), (Axes(N='model'), 'there are: data'),
    (Axes(M=('data', 'fsdp', 'tensor'), K='tensor'), 'is given twice'),
    (Axes(K=('tensor', 'fsdp', 'data')), 'cut groups of 16; expected a multiple of 128 rows'),
    (Axes(N=('tensor', 'fsdp', 'data')), 'N = 12 does not divide over 8')])
def test_what_cannot_be_cut_is_refused(axes, match):
  x, values, scale, zero, spec = weights('w4a16-g16')
  with pytest.raises(ValueError, match=match):
    sharded.weight_only_matmul(x, values, scale, zero, spec, mesh(), axes)


def test_scales_in_codes_are_refused():
  x, values, scale, zero, spec = weights('nf4-g16-dq')
  with pytest.raises(ValueError, match='scales of Nested; expected'):
    sharded.weight_only_matmul(x, values, scale, zero, spec, mesh(), AXES['row'])


def weight(scheme, axes, layout='packed'):
  shape = 64, 128 if layout == 'panels' else 16
  w = rtn(Dense(jax.random.normal(jax.random.key(0), shape), 'io', axes), scheme)
  return w if layout == 'packed' else Prepared.of(w, layout)


def product(w, x):
  """Gradients of x and of the scales, and the value, jitted under the mesh where there is one."""
  scales = lambda a: jnp.issubdtype(a.dtype, jnp.floating) and a.ndim == 2      # none of scales'
  floats, other = (jax.tree.map(lambda a, keep=keep: a if scales(a) == keep else None, w)
                   for keep in (True, False))
  join = lambda f: jax.tree.map(lambda a, b: b if a is None else a, f, other,
                                is_leaf=lambda a: a is None)

  def loss(x, floats):
    y = join(floats).einsum('btd,df->btf', x)
    return jnp.sum(jnp.sin(y)), y
  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, floats)


@pytest.mark.parametrize(('scheme', 'layout'), [
    ('w4a16-g16', 'packed'), ('w4a16-g8-asym', 'int4'), ('nf4-g16-dq', 'columns'),
    ('w3a16-g8', 'packed'), ('w8a8', 'packed'), ('w4a8-g16', 'int4'), ('w8a8', 'columns'),
    ('w4a16-g16', 'panels'), ('w4a8-g16', 'panels')])
@pytest.mark.parametrize('axes', [('embed', 'mlp'), ('mlp', 'embed')], ids='-'.join)
@pytest.mark.parametrize('rows', [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_weight_multiplies_on_a_mesh_as_on_one_device(scheme, layout, axes, rows):
  w = weight(scheme, axes, layout)
  x = jax.random.normal(jax.random.key(1), (rows, 3, 64))
  want = product(w, x)
  with on(mesh()):
    got = product(jax.device_put(w, shardings(w, mesh())), x)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    # sums of at most 64 terms in another order; gradients of bfloat16 scales round each part's sum
    near = 2. ** -7 if a.dtype == jnp.bfloat16 else 1e-5
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    np.testing.assert_allclose(a, b, rtol=near, atol=near * float(np.abs(b).max()))


@pytest.mark.parametrize('scheme', ['w4a16-g16', 'w4a8-g16'])
@pytest.mark.parametrize('axes', [('embed', 'mlp'), ('mlp', 'embed')], ids='-'.join)
def test_a_weight_on_a_mesh_moves_its_bytes_and_is_multiplied_by_the_kernel(scheme, axes):
  w = weight(scheme, axes)
  x = jnp.ones((4, 3, 64))
  with on(mesh()):
    run = jax.jit(lambda w, x: w.einsum('btd,df->btf', x))
    text = run.lower(jax.device_put(w, shardings(w, mesh())), x).compile().as_text()
  moved = gathered(text)
  # 64 rows are 32 of bytes, 16 columns; half of them are another device's of the axis 'tensor'
  assert ('u8', '32,8' if axes[0] == 'embed' else '16,16') in moved
  assert all(kind == 'u8' or shape.split(',')[0] in '24' for kind, shape in moved), moved  # scales
  assert library.why_not() or 'lean_' in text


@pytest.mark.parametrize('how', ['no rules', 'experts'])
def test_what_no_rule_places_is_left_to_the_compiler(how):
  w = weight('w4a16-g16', ('embed', 'mlp'))
  x, eqn = jnp.ones((4, 64)), 'bd,df->bf'
  if how == 'experts':
    w = rtn(Dense(jnp.ones((2, 64, 16)), 'eio', ('experts', 'embed', 'mlp')), 'w4a16-g16')
    x, eqn = jnp.ones((2, 4, 64)), 'ebd,edf->ebf'
  with jax.set_mesh(mesh()) if how == 'no rules' else on(mesh()):
    assert 'shard_map' not in str(jax.make_jaxpr(lambda w, x: w.einsum(eqn, x))(w, x))
