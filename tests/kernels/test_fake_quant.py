"""fake_quant: what training rounds is what is stored, NaNs too, and each form is the reference."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.fake_quant import api, learned
from lean_jax.quantization import formats
from lean_jax.quantization.codes import magnitude, total_of
from lean_jax.quantization.spec import parse_spec

SCHEMES = ('w4a16', 'w4a16-g8', 'w2a16-g8', 'w8a16-tensor', 'w1.58a16', 'w1a16-g8', 'nf4-g8',
           'nf4-g8-dq', 'fp8', 'mxfp4', 'mxfp8')
LONG = 4096                   # a row or a column that is vectors to a CPU


def draw(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def learnable(text, shape, dtype=jnp.float32):
  """v, step and offset of a scheme."""
  spec, (*batch, I, O) = parse_spec(text), shape
  of = (*batch, 1, 1) if spec.tensor else (*batch, -(-I // (spec.group or I)), O)
  offset = None if spec.symmetric else jnp.full(of, -.75)
  return draw(*shape, dtype=dtype), jnp.full(of, .25), offset, spec


@pytest.mark.parametrize('scheme', SCHEMES)
def test_what_is_compiled_is_the_reference_bit_for_bit(scheme):
  w, spec = draw(2, 64, 6), parse_spec(scheme)
  got = jax.jit(lambda w: api.fake_quant(w, spec))(w)
  np.testing.assert_array_equal(got, api.fake_quant(w, spec, implementation='reference'))
  np.testing.assert_array_equal(got, formats.dequantize(*formats.quantize(w, spec), spec, w.dtype))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('scheme', ['w4a16-g8', 'w2a16', 'w4a16-tensor'])
def test_a_learned_step_rounds_as_its_codes(scheme, dtype):
  v, step, offset, spec = learnable(scheme, (2, 20, 6), dtype)
  got = jax.jit(lambda *a: api.learned_step(*a, spec))(v, step, offset)
  assert got.dtype == dtype
  want = formats.dequantize(*learned.encode(v, step, offset, spec), spec, dtype)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_nan_makes_all_that_shares_its_scale_nan_and_nothing_else(scheme):
  spec = parse_spec(scheme)
  w = draw(64, 6).at[11, 2].set(jnp.nan)
  got = np.isnan(jax.jit(lambda w: api.fake_quant(w, spec))(w))
  group = spec.group or 64
  want = np.zeros((64, 6), bool)
  want[11 // group * group:(11 // group + 1) * group, 2] = True
  if spec.tensor or spec.double:
    want[:] = True
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(('scheme', 'shape'), [
    ('w4a16', (LONG, 3)), ('w4a16-asym', (LONG, 64)), ('w8a16-tensor', (64, LONG)),
    ('w4a16-g64', (64, LONG)), ('fp8', (LONG, 3)), ('mxfp4', (64, LONG)), ('nf4-g64', (LONG, 3))])
def test_a_nan_is_kept_however_long_what_shares_a_scale_is(scheme, shape):
  """XLA's maximum of many floats on a CPU is one of numbers alone."""
  spec = parse_spec(scheme)
  w = draw(*shape).at[37, 1].set(jnp.nan)
  got = jax.jit(lambda w: api.fake_quant(w, spec))(w)
  assert np.isnan(got[37, 1])
  group = spec.group or len(w)
  assert spec.tensor or np.isnan(got).sum() == group


def test_a_nan_in_rows_or_weights_of_a_learned_step_is_kept():
  y = api.fake_quant_rows(draw(3, LONG).at[1, 5].set(jnp.nan))
  assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
  for scheme in ('w4a16-g8', 'w2a16', 'w4a16-tensor'):
    v, step, offset, spec = learnable(scheme, (24, 6))
    v = v.at[11, 2].set(jnp.nan)
    got = jax.jit(lambda *a, spec=spec: api.learned_step(*a, spec))(v, step, offset)
    assert np.flatnonzero(np.isnan(got)).tolist() == [11 * 6 + 2]
    kept = formats.dequantize(*learned.stored(v, step, offset, spec), spec, v.dtype)
    size = 24 * 6 if spec.tensor else spec.group or 24
    assert np.isnan(kept[11, 2]) and np.isnan(kept).sum() == size
  _, pull = jax.vjp(lambda s: api.learned_step(v, s, offset, spec), step)
  assert np.isnan(pull(jnp.ones_like(v))[0]).all()


@pytest.mark.parametrize(('shape', 'axis'), [((3, LONG), -1), ((LONG, 3), 0), ((64, 64, 40), 1),
                                             ((5, 7, 9), (0, 1, 2)), ((5, 7, 9), (-2, -1))])
def test_the_greatest_magnitude_is_that_of_numpy_with_its_nans(shape, axis):
  x = np.array(draw(*shape))
  for values in ((), (np.inf,), (-np.inf, np.inf), (np.nan,), (-np.nan, np.inf), (-3e38, 3e38)):
    x.flat[:2 * len(values):2] = values
    got = jax.jit(lambda x: magnitude(x, axis))(x)
    np.testing.assert_array_equal(got, np.max(np.abs(x), axis=axis))


@pytest.mark.parametrize('rows', [1, 3, 31, 4096, 4097])
def test_a_sum_in_one_order_is_a_sum_and_writes_little_out(rows):
  x = draw(rows, 40)
  run = jax.jit(lambda x: total_of(x, 0, jnp.abs)).lower(x).compile()
  want = np.abs(np.asarray(x, np.float64)).sum(axis=0)
  # of positive numbers, which pass through 3 additions in each of 7 steps
  np.testing.assert_allclose(run(x), want, rtol=21 * 2. ** -24)
  assert run.memory_analysis().temp_size_in_bytes <= x.nbytes // 4 + 4096


@pytest.mark.parametrize('scheme', ['w4a16-g64', 'w2a16-g64', 'w4a16'])
def test_the_gradients_of_a_learned_step_are_one_reduction_and_one_loop(scheme):
  """What a CPU's compiler writes out besides: the terms of one sum, not of both."""
  v, step, offset, spec = learnable(scheme, (1024, 512))
  run = lambda v, s, o, g: jax.vjp(lambda *a: api.learned_step(*a, spec), v, s, o)[1](g)
  made = jax.jit(run).lower(v, step, offset, v).compile()
  assert made.memory_analysis().temp_size_in_bytes <= 1.2 * v.nbytes


@pytest.mark.parametrize(('call', 'says'), [
    (lambda w: api.fake_quant(w[0], parse_spec('w4a16')), r'w is float32 \(6,\); expected floats'),
    (lambda w: api.fake_quant(w.astype(jnp.int8), parse_spec('w4a16')), 'w is int8'),
    (lambda w: api.fake_quant(w, 'w4a16'), "spec is 'w4a16'; expected a QuantSpec"),
    (lambda w: api.fake_quant(w, parse_spec('w4a16-g64')), r'groups of 64 inputs, and w \(24, 6\)'),
    (lambda w: api.fake_quant(w, parse_spec('w4a16'), implementation='pallas'), 'there are: xla'),
    (lambda w: api.fake_quant_rows(w[0]), r'expected floats \[\.\.\. M K\]'),
    (lambda w: api.fake_quant_rows(w, implementation='fast'), 'there are: xla, reference'),
    (lambda w: api.learned_step(w, jnp.ones((3, 6)), None, parse_spec('nf4-g8')), 'no grid of int'),
    (lambda w: api.learned_step(w, jnp.ones((2, 6)), None, parse_spec('w4a16-g8')),
     r'step \(2, 6\) and offset None do not fit \(24, 6\) of w4a16-g8; expected \(3, 6\)'),
    (lambda w: api.learned_step(w, jnp.ones((3, 6)), None, parse_spec('w2a16-g8')),
     r'expected \(3, 6\), and offset the same'),
    (lambda w: api.learned_step(w, jnp.ones((1, 1)), jnp.ones((1, 1)), parse_spec('w4a16-tensor')),
     'offset None'),
    (lambda w: api.learned_step(w, jnp.ones((3, 6), int), None, parse_spec('w4a16-g8')),
     'step is int32')])
def test_what_does_not_fit_is_refused(call, says):
  with pytest.raises(ValueError, match=says):
    call(draw(24, 6))
