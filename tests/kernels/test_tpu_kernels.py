"""The TPU kernels are the references: in Pallas' interpreters, whatever the sizes."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lean_jax.kernels.int8_matmul import api as int8_api
from lean_jax.kernels.int8_matmul import reference as int8_reference
from lean_jax.kernels.int8_matmul import tpu as int8_tpu
from lean_jax.kernels.platforms import device, tuned
from lean_jax.kernels.weight_only_matmul import api as weight_only_api
from lean_jax.kernels.weight_only_matmul import reference as weight_only_reference
from lean_jax.kernels.weight_only_matmul import tpu as weight_only_tpu
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.spec import parse_spec
from tests.kernels.races import WATCHED, raced, seen
from tests.xla import NEWER

# At most 3 x 2 x 3 steps: rows, columns and depth of a tile, of operands that no tile divides.
SIZES = st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 200))
TILE = (32, 128, 128)


def int8_operands(M, K, N, group, bits=8, seed=0, batch=()):
  rng, G = np.random.default_rng(seed), -(-K // group) if group else 1
  most = 2 ** (bits - 1) - 1
  values = rng.integers(-most - 1, most + 1, (*batch, K, N)).astype(np.int8)
  return (jnp.asarray(rng.normal(size=(*batch, M, K)), jnp.float32),
          jnp.asarray(values).astype(f'int{bits}'),
          jnp.asarray(rng.uniform(.01, 1, (*batch, G, N)), jnp.float32))


def powers(operands):
  """The scales as powers of two: float32 products with them are exact, in whatever order."""
  x, values, scale = operands
  return x, values, 2. ** jnp.round(jnp.log2(scale))


@settings(deadline=None, max_examples=6)
@given(SIZES, st.sampled_from([(None, 8), (32, 8), (None, 4), (96, 4)]),
       st.integers(0, 2 ** 31 - 1))
def test_int8_matmul_equals_the_reference(sizes, how, seed):
  group, bits = how
  x, values, scale = int8_operands(*sizes, group, bits, seed)
  got = int8_tpu.int8_matmul(x, values, scale, group=group, blocks=TILE, interpret=True)
  want = int8_reference.int8_matmul(x, values, scale, group=group)
  # integers are exact; two float32 roundings, in another order, and with groups up to ten terms
  np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-6 * np.abs(want).max() if group else 0)


def test_the_integers_of_int8_matmul_are_exact():
  x, values, _ = int8_operands(40, 300, 130, None)
  ones = jnp.ones((1, 130))
  step = jnp.asarray(1.)                               # rows are rounded to whole numbers
  got = int8_tpu.int8_matmul(127 * x, values, ones, step, blocks=TILE, interpret=True)
  codes = np.clip(np.round(127 * np.asarray(x)), -127, 127).astype(np.int64)
  np.testing.assert_array_equal(got, codes @ np.asarray(values, np.int64))


@pytest.mark.parametrize('activation', [None, 'silu', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('relu', 'gelu'))])
@pytest.mark.parametrize('depth', [128, 512])
def test_bias_and_activation_in_the_kernel_are_those_after_it(activation, depth):
  x, values, scale = int8_operands(5, 300, 140, None, batch=(2,))
  bias = jax.random.normal(jax.random.key(0), (2, 1, 140))
  act = activation and int8_api.ACTIVATIONS[activation]
  got = int8_tpu.int8_matmul(x, values, scale / 100, bias=bias, activation=act,
                             blocks=(32, 128, depth), interpret=True)
  want = int8_api.int8_matmul(x, values, scale / 100, bias=bias, activation=activation,
                              implementation='reference')
  # the sums are equal; a few float32 roundings of numbers up to some hundred
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-5)


def weight_only_operands(scheme, M, K, N, seed=0, batch=()):
  rng, spec = np.random.default_rng(seed), parse_spec(scheme)
  x = jnp.asarray(rng.normal(size=(*batch, M, K)), jnp.bfloat16)
  codes, scale, zero = formats.quantize(jnp.asarray(rng.normal(size=(*batch, K, N)), jnp.float32),
                                        spec)
  return x, layouts.arranged(codes, spec, 'int4'), scale, zero, spec


SLOW = [pytest.param(scheme, marks=pytest.mark.slow)
        for scheme in ('w4a16-g32', 'w2a16-g32-sym', 'w8a16-g32-asym', 'w3a16-g128')]
SCHEMES = ('w4a16-g32-asym', 'w2a16-g64', 'w8a16-g32', *SLOW)


@pytest.mark.parametrize('scheme', SCHEMES)
@settings(deadline=None, max_examples=2)
@given(st.tuples(st.integers(1, 70), st.integers(128, 300), st.integers(1, 200)),
       st.integers(0, 2 ** 31 - 1))
def test_weight_only_matmul_equals_the_reference(scheme, sizes, seed):
  given = weight_only_operands(scheme, *sizes, seed=seed)
  # XLA's older code generation aborts where integers of two bits are padded
  got = jax.jit(lambda *x: weight_only_tpu.weight_only_matmul(
      *x, given[-1], blocks=TILE, interpret=True), compiler_options=NEWER)(*given[:-1])
  wide = [given[0].astype(jnp.float32), *given[1:]]
  want = weight_only_reference.weight_only_matmul(*wide, layout='int4')
  # each weight is rounded to bfloat16 (zero point, scale, product: three times 2 ** -9), each sum
  # once more; bounded by the sum of the magnitudes
  w = weight_only_reference.matrix(*given[1:], sizes[1], jnp.float32, 'int4')
  bound = jnp.abs(wide[0]) @ jnp.abs(w) * 4 * 2. ** -9
  assert np.all(np.abs(np.asarray(got, np.float32) - want) <= bound + 1e-6)


@pytest.mark.parametrize('tile', [
    pytest.param((32, 128, 128), marks=pytest.mark.slow), (32, 128, 512)])
def test_experts_are_multiplied_each_with_its_own_weight(tile):
  x, values, scale, zero, spec = weight_only_operands('w4a16-g32-asym', 9, 200, 150, batch=(3,))
  got = weight_only_tpu.weight_only_matmul(x, values, scale, zero, spec, blocks=tile,
                                           interpret=True)
  one = functools.partial(weight_only_tpu.weight_only_matmul, spec=spec, blocks=tile,
                          interpret=True)
  for e in range(3):
    np.testing.assert_array_equal(got[e], one(x[e], values[e], scale[e], zero[e]))


def test_the_interpreter_sees_a_race():
  def summed(x, y):
    @pl.when(pl.program_id(0) == 0)
    def _():
      y[...] = jnp.zeros_like(y)
    y[...] += x[...]                                       # all steps into one block
  run = functools.partial(
      pl.pallas_call, summed, grid=(4,), in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
      out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
      out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=WATCHED)
  given = lambda kind: pltpu.CompilerParams(dimension_semantics=(kind,))
  assert not raced(lambda: run(compiler_params=given('arbitrary'))(jnp.ones((32, 128))))
  assert raced(lambda: run(compiler_params=given('parallel'))(jnp.ones((32, 128))))


@pytest.mark.parametrize('group', [None, 32])
def test_int8_matmul_has_no_races_and_reads_nothing_uninitialised(group):
  x, values, scale = powers(int8_operands(40, 200, 130, group, 4))
  got = int8_tpu.int8_matmul(x, values, scale, group=group, blocks=TILE,
                             interpret=WATCHED)
  want = int8_reference.int8_matmul(x, values, scale, group=group)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
  assert not seen()


def test_weight_only_matmul_has_no_races_and_reads_nothing_uninitialised():
  given = weight_only_operands('w4a16-g32-asym', 40, 200, 130)
  got, want = (weight_only_tpu.weight_only_matmul(*given, blocks=TILE, interpret=how)
               for how in (WATCHED, True))
  # the same products and sums
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=8e-3)
  assert not seen()


def test_a_nan_reaches_the_product_of_its_row_alone():
  x, values, scale = int8_operands(4, 200, 130, None)
  y = int8_tpu.int8_matmul(x.at[1, 3].set(jnp.nan), values, scale, blocks=TILE, interpret=True)
  assert bool(jnp.all(jnp.isnan(y[1]))) and bool(jnp.all(jnp.isfinite(y[jnp.array([0, 2, 3])])))


@pytest.mark.parametrize(('kind', 'why'), [
    ('v5e', None), ('v6e', None), ('v5p', None), ('v4', 'units that multiply int8, which TPU v4'),
    ('tpu7x', 'units that multiply int8, which TPU7x')])
def test_the_kernel_of_int8_matmul_is_the_form_of_tpus_that_multiply_int8(kind, why):
  x, values, scale = int8_operands(4, 200, 130, None)
  with device.target(kind):
    program = str(jax.make_jaxpr(int8_api.int8_matmul)(x, values, scale))
    assert ('pallas_call' in program) is (why is None)
    if why:
      with pytest.raises(ValueError, match=f'pallas.*{why} has not; here there are: xla'):
        int8_api.int8_matmul(x, values, scale, implementation='pallas')
  assert 'pallas_call' not in str(jax.make_jaxpr(int8_api.int8_matmul)(x, values, scale))


@pytest.mark.parametrize(('scheme', 'kind', 'dtype', 'why'), [
    ('w4a16-g32', 'v5e', 'bfloat16', None), ('w4a16-g32', 'tpu7x', 'bfloat16', None),
    ('w4a16-g32', 'v4', 'bfloat16', 'slower than XLA'), ('w4a16', 'v5e', 'bfloat16', 'groups'),
    ('w4a16-g32', 'v5e', 'float32', 'in bfloat16'), ('w4a16-g48', 'v5e', 'bfloat16', 'of 32 rows')])
def test_weight_only_matmul_says_why_its_kernel_does_not_fit(scheme, kind, dtype, why):
  x, *rest = weight_only_operands(scheme, 4, 192, 130)
  product = functools.partial(weight_only_api.weight_only_matmul, spec=rest[-1], layout='int4')
  with device.target(kind):
    program = str(jax.make_jaxpr(product)(x.astype(dtype), *rest[:-1]))
    assert ('pallas_call' in program) is (why is None)
    if why:
      with pytest.raises(ValueError, match=why):
        product(x.astype(dtype), *rest[:-1], implementation='pallas')


def test_a_kernel_asked_for_on_a_cpu_says_where_it_runs():
  x, values, scale = int8_operands(4, 200, 130, None)
  with pytest.raises(ValueError, match='runs on tpu.*, and this is cpu; here there are: .*xla'):
    int8_api.int8_matmul(x, values, scale, implementation='pallas')
  with pytest.raises(ValueError, match='there are: v4, v5e, v5p, v6e, tpu7x'), \
      device.target('v3'):
    pass


@pytest.mark.parametrize('group', [None, 32])
@pytest.mark.parametrize('activation', [None, 'silu'])
def test_gradients_through_bias_and_activation_are_those_of_the_composition(group, activation):
  x, values, scale = int8_operands(5, 64, 6, group)
  bias = jax.random.normal(jax.random.key(0), (6,))
  act = (lambda y: y) if activation is None else int8_api.ACTIVATIONS[activation]

  def fused(x, s, b):
    return jnp.sum(jnp.sin(int8_api.int8_matmul(x, values, s / 100, group=group, bias=b,
                                                activation=activation)))

  def composed(x, s, b):
    return jnp.sum(jnp.sin(act(int8_api.int8_matmul(x, values, s / 100, group=group) + b[None])))
  for got, want in zip(*(jax.grad(f, (0, 1, 2))(x, scale, bias) for f in (fused, composed))):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)        # the same operations


@pytest.mark.parametrize('shape', [
    (1, 4096, 4096, None), (33, 100, 70, 96), (4096, 28672, 8192, 32)])
def test_a_fitted_tile_is_no_larger_than_the_operands_and_legal(shape):
  M, K, N, group = shape
  for tile in [(1, 1, 1), (512, 512, 2048), tuned.by_rule(M, K, N), (10 ** 5,) * 3]:
    bm, bn, bk = tuned.fitted(tile, M, K, N, group)
    assert bm == M or (bm < M and bm % 32 == 0)
    assert bn == N or (bn < N and bn % 128 == 0)
    assert bk % 128 == 0 and bk % (group or 1) == 0 and bk - K < np.lcm(group or 1, 128)


@pytest.mark.parametrize('layout', ['packed', 'int4', 'columns'])
def test_layouts_hold_the_same_weight(layout):
  x, values, scale = int8_operands(3, 40, 6, None)
  stored = jnp.swapaxes(values, -1, -2) if layout == 'columns' else values
  product = lambda v, layout: int8_api.int8_matmul(x, v, scale, layout=layout,
                                                   implementation='xla')
  np.testing.assert_array_equal(product(stored, layout), product(values, 'packed'))
  with pytest.raises(ValueError, match='expected one of packed, int4, columns'):
    int8_api.int8_matmul(x, values, scale, layout='rows')
