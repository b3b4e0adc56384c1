"""Integer formats: what goes in comes out within the bound, in the bytes that the name says."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lean_jax.errors import InputError
from lean_jax.quantization import formats
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.weights import Dense, Quantized

SPECS = ('w8a16', 'w8a16-g5', 'w4a16', 'w4a16-g8', 'w4a16-g8-asym', 'w2a16', 'w2a16-g6',
         'w2a16-g6-sym', 'w8a16-asym')


@pytest.mark.parametrize('text', [*formats.KNOWN, *SPECS])
def test_a_name_parses_to_what_it_prints(text):
  spec = formats.parse_spec(text)
  assert formats.parse_spec(str(spec)) == spec


@pytest.mark.parametrize('text', ['w5a16', 'w4a16-g0', 'w4a16-g', 'w4', '', 'int8', 'w4a8',
                                  'w8a8-g64', 'w8a8-asym', None])
def test_a_name_out_of_the_grammar_is_refused_in_one_line(text):
  with pytest.raises(InputError, match='scheme') as error:
    formats.parse_spec(text)
  assert '\n' not in str(error.value)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 4, 8]), st.booleans(), st.integers(1, 17), st.integers(1, 3),
       st.integers(0, 2 ** 31 - 1))
def test_pack_and_unpack_are_inverse(bits, symmetric, rows, columns, seed):
  spec = formats.QuantSpec(bits, symmetric=symmetric)
  codes = np.random.default_rng(seed).integers(spec.low, spec.high + 1, (2, rows, columns))
  codes = jnp.asarray(codes, jnp.int8 if symmetric else jnp.uint8)
  packed = formats.pack(codes, bits)
  assert packed.dtype.itemsize == 1 and packed.shape == (2, -(-rows * bits // 8), columns)
  np.testing.assert_array_equal(formats.unpack(packed, spec, rows), codes)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SPECS), st.integers(1, 20), st.integers(-3, 3), st.integers(0, 2 ** 31 - 1))
def test_the_error_is_within_half_a_step(text, rows, power, seed):
  spec = formats.parse_spec(text)
  x = jnp.asarray(np.random.default_rng(seed).normal(size=(rows, 3)) * 10. ** power, jnp.float32)
  codes, scale, zero = formats.quantize(x, spec)
  y = np.asarray(formats.dequantize(codes, scale, zero, spec, jnp.float32), np.float64)
  group = spec.group or rows
  step = np.repeat(np.asarray(scale, np.float64), group, axis=0)[:rows]
  # A bfloat16 scale is off by up to 2^-9 of itself, so the outermost codes are too; a zero point
  # moves the grid by at most half a step, which can push one end out by as much.
  levels = 2 ** spec.bits
  slack = (levels * 2. ** -9 if spec.group else 1e-5) + (0 if spec.symmetric else .5)
  assert np.all(np.abs(y - np.asarray(x, np.float64)) <= step * (.5 + slack) + 1e-30)


def test_a_symmetric_zero_is_exact_and_so_is_a_group_of_zeros():
  x = jnp.zeros((8, 3)).at[1, 1].set(2.)
  for text in SPECS:
    spec = formats.parse_spec(text)
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
