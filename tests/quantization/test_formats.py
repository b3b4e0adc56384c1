"""Formats: what goes in comes out within the bound, in the bytes that the name says."""
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_jax.errors import InputError
from lean_jax.quantization import codes as grid
from lean_jax.quantization import formats
from lean_jax.quantization.packing import pack, unit, unpack
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import GRAMMAR, KNOWN, parse_spec
from lean_jax.weights import Dense, Quantized

SPECS = ('w8a16', 'w8a16-g5', 'w4a16', 'w4a16-g8', 'w4a16-g8-asym', 'w2a16', 'w2a16-g6',
         'w2a16-g6-sym', 'w8a16-asym', 'w3a16', 'w3a16-g8', 'w3a16-g6-asym', 'w5a16-g8',
         'w6a16-g7-asym', 'w8a16-tensor', 'w4a16-tensor-asym', 'nf4-g8', 'nf4-g6-dq', 'fp4-g8',
         'fp4-g8-dq', 'fp4_e2m1-g8', 'fp8', 'fp8-g8', 'fp8-tensor', 'fp8_e5m2', 'w1a16',
         'w1a16-g5', 'w1.58a16', 'w1.58a16-g8')
INTEGERS = tuple(t for t in SPECS if parse_spec(t).code == 'int')
MX = ('mxfp4', 'mxfp8')


@pytest.mark.parametrize('text', [*KNOWN, *SPECS])
def test_a_name_parses_to_what_it_prints(text):
  spec = parse_spec(text)
  assert parse_spec(str(spec)) == spec
  assert text in (str(spec), *SPECS)


@pytest.mark.parametrize('text', [
    'w7a16', 'w4a16-g0', 'w4a16-g', 'w4', '', 'int8', 'w4a4', 'w4a8-asym', 'w8a8-asym', 'w2a8',
    'w4a8-static', 'w8a16-static', 'w1a16-asym', 'w1.58a8-tensor', 'nf4-asym', 'nf4-tensor',
    'mxfp4-g64', 'fp8-dq', 'w4a16-g64-dq', None])
def test_a_name_out_of_the_grammar_is_refused_in_one_line(text):
  with pytest.raises(InputError, match='scheme') as error:
    parse_spec(text)
  assert '\n' not in str(error.value)


def test_a_wrong_name_is_told_the_grammar_and_the_nearest_names():
  with pytest.raises(InputError, match='near it: .*w4a16-g64') as error:
    parse_spec('w4a16g64')
  assert GRAMMAR in str(error.value)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 1.6, 2, 3, 4, 5, 6, 7]), st.integers(1, 33), st.integers(1, 3),
       st.integers(0, 2 ** 31 - 1))
def test_pack_and_unpack_are_inverse(bits, rows, columns, seed):
  codes = np.random.default_rng(seed).integers(0, 3 if bits == 1.6 else 2 ** bits,
                                               (2, rows, columns)).astype(np.uint8)
  packed = pack(jnp.asarray(codes), bits)
  each, size = unit(bits)
  assert packed.dtype == jnp.uint8
  assert packed.shape == (2, -(-rows // each) * size, columns)
  np.testing.assert_array_equal(unpack(packed, bits, rows), codes)


@pytest.mark.parametrize('bits', [1, 2, 3, 4, 5, 6, 7])
def test_a_column_is_one_stream_of_bits_the_first_lowest(bits):
  codes = np.random.default_rng(0).integers(0, 2 ** bits, (16, 1)).astype(np.uint8)
  number = sum(int(c) << bits * k for k, c in enumerate(codes[:, 0]))
  want = np.frombuffer(number.to_bytes(2 * bits, 'little'), np.uint8)
  np.testing.assert_array_equal(pack(jnp.asarray(codes), bits)[:, 0], want)


@pytest.mark.parametrize(('text', 'bits'), [
    ('w3a16', 3), ('w4a16', 4), ('w2a16-sym', 2), ('w1a16', 1), ('w1.58a16', 1.6), ('fp8', 8)])
def test_the_stored_bytes_are_what_the_name_says(text, bits):
  w = rtn(Dense(jnp.ones((960, 3)), 'io', (None, None)), text)
  assert w.values.size * w.values.dtype.itemsize == 960 * 3 * bits / 8


def test_double_quantization_leaves_0127_bits_of_scales_a_parameter():
  w = Dense(jax.random.normal(jax.random.key(0), (1024, 512)), 'io', (None, None))
  plain, double = (rtn(w, text) for text in ('nf4-g64', 'nf4-g64-dq'))
  bits = lambda w: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(w)) * 8 / 1024 / 512
  assert bits(plain) == 4.5
  assert round(bits(double) - 4, 3) == .127            # QLoRA, section 3
  off = jnp.abs(double.scale.astype(jnp.float32) / plain.scale - 1)
  assert 0 < float(off.max()) < .05


def draw(seed, rows, power, columns=3):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(rows, columns)) * 10. ** power,
                     jnp.float32)


def returned(x, spec):
  """What x becomes and the scale of each of its values, in float64."""
  codes, scale, zero = formats.quantize(x, spec)
  y = np.asarray(formats.dequantize(codes, scale, zero, spec, jnp.float32), np.float64)
  wide = np.asarray(grid.wide(scale, spec), np.float64)
  step = np.broadcast_to(np.repeat(wide, spec.group or len(x), axis=0)[:len(x)], x.shape)
  return y, step


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(INTEGERS), st.integers(8, 20), st.integers(-3, 3),
       st.integers(0, 2 ** 31 - 1))
def test_the_error_of_integers_is_within_half_a_step(text, rows, power, seed):
  spec = parse_spec(text)
  x = draw(seed, rows, power)
  y, step = returned(x, spec)
  # A bfloat16 scale is off by up to 2^-9 of itself, so the outermost codes are too; a zero point
  # moves the grid by at most half a step, which can push one end out by as much.
  levels = 2 ** spec.bits
  slack = (levels * 2. ** -9 if spec.group else 1e-5) + (0 if spec.symmetric else .5)
  assert np.all(np.abs(y - np.asarray(x, np.float64)) <= step * (.5 + slack) + 1e-30)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(['nf4-g8', 'fp4-g8', 'fp4_e2m1-g5']), st.integers(8, 20),
       st.integers(-3, 3), st.integers(0, 2 ** 31 - 1))
def test_a_table_gives_the_nearest_of_its_numbers(text, rows, power, seed):
  spec = parse_spec(text)
  x = draw(seed, rows, power)
  y, step = returned(x, spec)
  table = {'nf4': grid.NF4, 'fp4': grid.FP4, 'fp4_e2m1': grid.E2M1 / 6}[spec.code]
  x = np.asarray(x, np.float64)
  best = np.abs(x[..., None] - step[..., None] * table.astype(np.float64)).min(axis=-1)
  assert np.all(np.abs(y - x) <= best + 1e-6 * step)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(['fp8', 'fp8-g8', 'fp8-tensor', 'fp8_e5m2', *MX]), st.integers(32, 40),
       st.integers(-3, 3), st.integers(0, 2 ** 31 - 1))
def test_the_error_of_a_float_is_within_half_of_its_last_place(text, rows, power, seed):
  spec = parse_spec(text)
  x = draw(seed, rows, power)
  y, step = returned(x, spec)
  mantissa, least = dict(fp8=(3, -6), fp8_e5m2=(2, -14), mxfp8=(3, -6), mxfp4=(1, 0))[spec.code]
  x = np.asarray(x, np.float64)
  exponent = np.maximum(np.floor(np.log2(np.abs(x / step) + 1e-300)), least)
  bound = step * 2. ** (exponent - mantissa) / 2
  top = {'mxfp4': 6., 'mxfp8': 448.}.get(spec.code)    # beyond it a block's values are clipped
  if top:
    bound = np.maximum(bound, np.abs(x) - top * step)
  # A grouped scale is bfloat16 and may be too small by 2^-9, which clips the largest value.
  slack = np.abs(x) * 2. ** -8 if spec.group and not top else 1e-6 * np.abs(x)
  assert np.all(np.abs(y - x) <= bound + slack)


@pytest.mark.parametrize('text', MX)
def test_mx_is_what_the_standard_says(text):
  """OCP Microscaling Formats 1.0, section 6.3, in float64, with ml_dtypes' own conversions."""
  spec = parse_spec(text)
  x = draw(0, 64, 0, 5)
  codes, scale, _ = formats.quantize(x, spec)
  wide = np.asarray(x, np.float64).reshape(2, 32, 5)
  top = dict(mxfp4=2, mxfp8=8)[text]
  shared = np.floor(np.log2(np.abs(wide).max(axis=1))) - top
  np.testing.assert_array_equal(scale, shared + 127)
  kind = dict(mxfp4=ml_dtypes.float4_e2m1fn, mxfp8=ml_dtypes.float8_e4m3fn)[text]
  unit = wide / 2. ** shared[:, None]
  limit = float(ml_dtypes.finfo(kind).max)
  want = np.clip(unit, -limit, limit).astype(np.float32).astype(kind)
  np.testing.assert_array_equal(np.asarray(codes).reshape(2, 32, 5), want.view(np.uint8))


@pytest.mark.parametrize('text', ['w1a16', 'w1a16-g5', 'w1.58a16', 'w1.58a16-g8'])
def test_one_bit_and_ternary_scales_are_mean_magnitudes(text):
  spec = parse_spec(text)
  x = np.asarray(draw(0, 12, 0), np.float64)
  y = np.asarray(formats.dequantize(*formats.quantize(jnp.asarray(x, jnp.float32), spec), spec,
                                    jnp.float32))
  for start in range(0, 12, spec.group or 12):
    part, got = x[start:start + (spec.group or 12)], y[start:start + (spec.group or 12)]
    scale = np.abs(part).mean(axis=0) if spec.group else np.abs(part).mean()
    middle = part.mean(axis=0) if spec.group else part.mean()
    want = np.where(part > middle, 1, -1) if spec.code == 'binary' else np.clip(
        np.round(part / scale), -1, 1)
    np.testing.assert_allclose(got, want * scale, rtol=2. ** -8 if spec.group else 1e-6)


def test_a_symmetric_zero_is_exact_and_so_is_a_group_of_zeros():
  x = jnp.zeros((8, 3)).at[1, 1].set(2.)
  for text in SPECS:
    spec = parse_spec(text)
    if spec.code == 'binary' or spec.group == 5:
      continue                                         # has no zero; 5 leaves another group
    y = formats.dequantize(*formats.quantize(x, spec), spec, jnp.float32)
    np.testing.assert_array_equal(y[:, 0], 0.)


@pytest.mark.parametrize('text', SPECS)
@pytest.mark.parametrize('dims', ['io', 'oi', 'nio', 'eio'])
def test_what_qat_trains_is_what_the_integers_compute(text, dims):
  shape = {'n': 2, 'e': 3, 'i': 12, 'o': 5}
  w = Dense(jax.random.normal(jax.random.key(0), tuple(shape[d] for d in dims)), dims,
            (None,) * len(dims))
  trained, stored = fake_quantize(w, text), rtn(fake_quantize(w, text), text)
  assert isinstance(stored, Quantized)
  np.testing.assert_array_equal(jax.jit(lambda w: w.unbox())(trained), stored.unbox())
  np.testing.assert_array_equal(rtn(w, text).unbox(), stored.unbox())


def test_the_gradient_of_fake_quant_is_that_of_the_float_value():
  w = Dense(jax.random.normal(jax.random.key(0), (8, 4)), 'io', (None, None))
  x, target = jnp.ones((2, 3, 8)), jax.random.normal(jax.random.key(1), (2, 3, 4))
  f = lambda v, make: jnp.sum(make(Dense(v, 'io', (None, None))).einsum('btd,df->btf', x) * target)
  rounded = jax.grad(f)(w.value, lambda w: fake_quantize(w, 'w2a16-g4'))
  np.testing.assert_allclose(rounded, jax.grad(f)(w.value, lambda w: w), rtol=1e-6)


def test_quantizing_what_cannot_be_is_refused():
  w = Dense(jnp.ones((8, 4)), 'io', (None, None))
  with pytest.raises(InputError, match='Quantized'):
    rtn(rtn(w, 'w4a16'), 'w4a16')
  with pytest.raises(InputError, match='w2a16'):
    rtn(fake_quantize(w, 'w2a16'), 'w4a16')
  with pytest.raises(InputError, match='Quantized'):
    fake_quantize(rtn(w, 'w4a16'), 'w4a16')


def test_contractions_that_the_group_does_not_divide_waste_no_rows():
  w = rtn(Dense(jax.random.normal(jax.random.key(0), (172, 4)), 'io', (None, None)), 'w4a16-g64')
  assert w.values.shape == (86, 4) and w.scale.shape == (3, 4)
  assert w.unbox().shape == (172, 4)


def test_a_group_larger_than_the_axis_is_refused():
  w = Dense(jnp.ones((8, 4)), 'io', (None, None))
  with pytest.raises(InputError, match='groups of 16 inputs, and the weight has 8'):
    rtn(w, 'w4a16-g16')


@pytest.mark.parametrize('scheme', ['nf4-g64', 'fp4-g64', 'mxfp4'])
def test_tables_are_read_by_selects_which_compilers_fuse(scheme):
  spec = parse_spec(scheme)
  program = str(jax.make_jaxpr(
      lambda x: formats.dequantize(*formats.quantize(x, spec), spec, x.dtype))(jnp.ones((64, 4))))
  assert 'select_n' in program
  assert not any(name in program for name in ('gather', 'sort', 'while', 'scan'))


@pytest.mark.parametrize('table', [grid.NF4, grid.FP4[:8], grid.E2M1[:8]])
def test_the_nearest_of_a_table_is_found_and_read_back(table):
  x = jnp.linspace(-1.5, 7, 4001)
  codes = grid._nearest(x, table)
  np.testing.assert_array_equal(codes, np.argmin(np.abs(np.asarray(x)[:, None] - table), axis=1))
  np.testing.assert_array_equal(grid._looked_up(table, codes), table[np.asarray(codes)])
  assert table[grid._nearest(jnp.array([jnp.nan]), table)[0]] == table.max()
