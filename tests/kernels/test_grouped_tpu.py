"""The TPU kernels of grouped products are the references, whatever the experts' rows."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_jax.kernels.grouped_matmul import api, reference, tpu
from lean_jax.kernels.int8_matmul import api as int8_api
from lean_jax.kernels.int8_matmul import tpu as int8_tpu
from lean_jax.kernels.platforms import device
from lean_jax.kernels.quantize_rows.reference import quantize_rows
from lean_jax.kernels.weight_only_matmul.reference import matrix
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights.prepared import Prepared
from lean_jax.weights.quantized import Quantized
from tests.kernels.races import WATCHED, seen

UNEVEN = (3, 0, 37, 1, 0, 29)
SIZES = [UNEVEN, *(pytest.param(s, marks=pytest.mark.slow) for s in (
    (0, 40, 0), (32, 32, 0, 64), (0, 1, 0, 0, 1, 0, 0, 0)))]
TILE = (32, 128)


def operands(scheme, sizes, K=100, N=150, seed=0):
  rng, spec = np.random.default_rng(seed), parse_spec(scheme)
  x = jnp.asarray(rng.normal(size=(sum(sizes), K)), jnp.bfloat16)
  w = jnp.asarray(rng.normal(size=(len(sizes), K, N)), jnp.float32)
  codes, scale, zero = formats.quantize(w, spec)
  values = layouts.arranged(codes, spec, 'int4')
  return x, values, scale, zero, spec, jnp.asarray(sizes, jnp.int32)


def within_rounding(got, x, values, scale, zero, spec, sizes):
  """Whether each weight is rounded to bfloat16 (zero point, scale, product: three times 2 ** -9)
  and each sum once more, bounded by the sum of the magnitudes."""
  w = matrix(values, scale, zero, spec, x.shape[1], jnp.float32, 'int4')
  wide = x.astype(jnp.float32)
  want = reference.grouped_matmul(wide, w, sizes)
  bound = reference.grouped_matmul(jnp.abs(wide), jnp.abs(w), sizes) * 4 * 2. ** -9
  return np.all(np.abs(np.asarray(got, np.float32) - want) <= bound + 1e-6)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize('scheme', [
    'w4a16-g32-asym', 'w8a16', *(pytest.param(s, marks=pytest.mark.slow) for s in (
        'w4a16-g64', 'w4a16-asym', 'w2a16-g32'))])
def test_rows_are_multiplied_by_the_weight_of_their_expert(scheme, sizes):
  given = operands(scheme, sizes)
  got = tpu.grouped_weight_only(*given, blocks=TILE, interpret=True)
  assert got.dtype == jnp.bfloat16
  assert within_rounding(got, *given)


def test_many_rows_of_an_expert_are_multiplied_by_a_tile_written_out():
  given = operands('w4a16-g32-asym', (70, 0, 90))
  assert within_rounding(tpu.grouped_weight_only(*given, blocks=(64, 128), interpret=True), *given)


@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_rows_are_multiplied_by_the_floats_of_their_expert(sizes):
  rng, shape = np.random.default_rng(0), (len(sizes), 100, 150)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((sum(sizes), 100), shape))
  sizes = jnp.asarray(sizes, jnp.int32)
  got = tpu.grouped_matmul(x, w, sizes, blocks=TILE, interpret=True)
  want = reference.grouped_matmul(*(a.astype(jnp.float32) for a in (x, w)), sizes)
  # sums in float32, rounded once
  np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2. ** -8, atol=1e-4)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_the_kernel_of_floats_is_the_form_of_a_tpu_and_of_bfloat16(dtype):
  x, w, sizes = jnp.ones((7, 32), dtype), jnp.ones((3, 32, 40), dtype), jnp.array([3, 0, 4])
  with device.target('v5e'):
    for f in (api.grouped_matmul, jax.grad(lambda *a: jnp.sum(api.grouped_matmul(*a) ** 2))):
      assert ('pallas_call' in str(jax.make_jaxpr(f)(x, w, sizes))) is (dtype == 'bfloat16')
    if dtype == 'float32':
      with pytest.raises(ValueError, match='in bfloat16'):
        api.grouped_matmul(x, w, sizes, implementation='pallas')


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@pytest.mark.parametrize(('group', 'bits'), [
    (None, 8), (32, 4), pytest.param(None, 4, marks=pytest.mark.slow)])
def test_integers_are_multiplied_by_those_of_their_expert(sizes, group, bits):
  x, values, scale = integers(sizes, group, bits)
  sizes = jnp.asarray(sizes, jnp.int32)
  got = int8_tpu.int8_grouped_matmul(*quantize_rows(x), values, scale, sizes, group=group,
                                     blocks=TILE, interpret=True)
  want = int8_api.int8_grouped_matmul(x, values, scale, sizes, group=group, layout='int4')
  # integers are exact, and scales are powers of two; the last products are rounded once
  np.testing.assert_allclose(got, want, rtol=3e-7)


def integers(sizes, group, bits, K=100, N=150):
  rng, most = np.random.default_rng(0), 2 ** (bits - 1) - 1
  values = jnp.asarray(rng.integers(-most - 1, most + 1, (len(sizes), K, N)), jnp.int8)
  scale = 2. ** jnp.asarray(rng.integers(-7, 1, (len(sizes), -(-K // group) if group else 1, N)))
  x = jnp.asarray(rng.normal(size=(sum(sizes), K)), jnp.float32)
  return x, values.astype(f'int{bits}'), scale.astype(jnp.float32)


@pytest.mark.parametrize('kind', ['codes', 'integers'])
def test_there_are_no_races_and_nothing_uninitialised_reaches_the_product(kind):
  sizes = (3, 0, 38)
  if kind == 'codes':
    given = operands('w4a16-g32-asym', sizes, K=64)
    run = functools.partial(tpu.grouped_weight_only, *given, blocks=TILE)
  else:
    x, values, scale = integers(sizes, None, 8, K=64)
    run = functools.partial(int8_tpu.int8_grouped_matmul, *quantize_rows(x), values, scale,
                            jnp.asarray(sizes), blocks=TILE)
  got, want = (np.asarray(run(interpret=how), np.float32)
               for how in (WATCHED, True))
  np.testing.assert_array_equal(got, want)
  assert not seen()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 70), min_size=5, max_size=5), st.sampled_from([8, 32]))
def test_each_tile_is_visited_once_for_each_expert_with_rows_in_it(cuts, bm):
  sizes = np.diff([0, *sorted(cuts), 70])
  expert, tile, start, end, (count,) = map(np.asarray, tpu.visits(jnp.asarray(sizes), 70, bm))
  of_row = np.repeat(np.arange(6), sizes)
  want = list(dict.fromkeys((row // bm, e) for row, e in enumerate(of_row)))
  assert list(zip(tile, expert))[:count] == want
  assert all((tile[k], expert[k]) == want[-1] for k in range(count, len(tile)))
  assert (end - start).tolist() == sizes.tolist() and end[-1] == 70


def test_a_nan_stays_in_its_row():
  x, *rest = operands('w4a16-g32', (3, 0, 37))
  y = tpu.grouped_weight_only(x.at[2, 5].set(jnp.nan), *rest, blocks=TILE, interpret=True)
  assert jnp.isnan(y).any(axis=1).tolist() == [k == 2 for k in range(40)]


@pytest.mark.parametrize(('kind', 'scheme', 'why'), [
    ('v5e', 'w4a16-g32', None), ('v6e', 'w8a16', None), ('v4', 'w4a16-g32', 'slower than XLA'),
    ('v5e', 'w4a16-g48', 'of 32 rows'), ('v5e', 'w4a8', None), ('tpu7x', 'w4a8', 'int8')])
def test_a_prepared_weight_reaches_the_kernel_of_its_device_or_says_why_not(kind, scheme, why):
  w = jax.random.normal(jax.random.key(0), (3, 96, 40))
  given = Quantized.of(w, parse_spec(scheme), 'eio', ('experts', 'embed', 'mlp'))
  given = Prepared.of(given, 'int4')
  x, sizes = jnp.ones((7, 96), jnp.bfloat16), jnp.array([3, 0, 4])
  with device.target(kind):
    program = str(jax.make_jaxpr(lambda x: given.grouped(x, sizes))(x))
    assert ('pallas_call' in program) is (why is None)
    grad = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(given.grouped(x, sizes)) ** 2.))(x))
    assert ('pallas_call' in grad) is (why is None)
    if why:
      w = given.rest
      product = (functools.partial(int8_api.int8_grouped_matmul, x, given.values, w.scale,
                                   layout=given.layout)
                 if w.spec.activation_bits == 8 else functools.partial(
                     api.grouped_weight_only, x, given.values, w.scale, w.zero, w.spec,
                     layout='int4'))
      with pytest.raises(ValueError, match=why):
        product(sizes=sizes, implementation='pallas')


@pytest.mark.parametrize('form', [None, 'ragged'])
def test_gradients_reach_the_rows_and_the_scales(form):
  x, values, scale, zero, spec, sizes = operands('w4a16-g32-asym', (3, 0, 5), 64, 6)
  x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)

  def loss(product, x, scale):
    return jnp.sum(jnp.sin(product(x, scale)))
  run = lambda x, s: api.grouped_weight_only(x, values, s, zero, spec, sizes, layout='int4',
                                             implementation=form)
  dense = lambda x, s: reference.grouped_matmul(
      x, matrix(values, s, zero, spec, 64, jnp.float32, 'int4'), sizes)
  for got, want in zip(*(jax.grad(functools.partial(loss, f), (0, 1))(x, scale)
                         for f in (run, dense))):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)        # float32 sums of 64 terms


def test_operands_that_do_not_fit_are_refused():
  x, values, scale, zero, spec, sizes = operands('w4a16-g32', (3, 4), 64, 6)
  run = functools.partial(api.grouped_weight_only, spec=spec, layout='int4')
  for change, message in [(dict(x=x[:, :-1]), 'do not fit 63 inputs'), (dict(x=x[0]), 'M K'),
                          (dict(sizes=sizes[:1]), 'do not fit'), (dict(scale=scale[:, :1]), 'fit'),
                          (dict(implementation='fast'), 'there are: native, pallas, blocks')]:
    with pytest.raises(ValueError, match=message):
      run(**dict(dict(x=x, values=values, scale=scale, zero=zero, sizes=sizes), **change))
  integers = functools.partial(int8_api.int8_grouped_matmul, x, values, scale, sizes, group=32,
                               layout='int4')
  assert integers().shape == (7, 6)
  with pytest.raises(ValueError, match='expected'):
    int8_api.int8_grouped_matmul(x, values, scale[:, :1], sizes, group=32, layout='int4')
  with pytest.raises(ValueError, match='runs on tpu, and this is cpu|is for a TPU'):
    integers(implementation='pallas')
