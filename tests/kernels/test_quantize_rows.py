"""quantize_rows: the kernel is the reference, and the gradient is that of what is rounded."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from lean_jax.kernels.quantize_rows import api, reference, tpu
from lean_jax.nn.norm import RMSNorm
from tests.kernels.races import WATCHED, seen

WAYS = {'plain': {}, 'norm': dict(norm=True, epsilon=1e-6, offset=1.), 'block': dict(block=128),
        'both': dict(norm=True, epsilon=1e-6, block=128)}


def operands(shape=(3, 256), seed=0, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1)))
  return jnp.asarray(x, dtype), jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32)


def given(way, norm):
  return {**WAYS[way], **({'norm': norm} if 'norm' in WAYS[way] else {})}


def kernel(x, scale=None, *, interpret=True, **how):
  return jax.jit(functools.partial(tpu.quantize_rows, interpret=interpret, **how))(x, scale)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('shape', [(1, 128), (2, 37, 256), (70, 384)])
def test_the_kernel_is_the_reference(way, shape, dtype):
  x, norm = operands(shape, dtype=dtype)
  how = given(way, norm)
  codes, step = kernel(x, **how)
  want, size = api.quantize_rows(x, implementation='reference', **how)
  assert codes.dtype == jnp.int8 and codes.shape == x.shape and step.shape == (*x.shape[:-1], 1)
  # Sums of at most 384 float32 numbers, in the norm or a rotation, are added in another order; of
  # bfloat16, what the norm gives may then round to the next one, 2^-8 away.
  near = 384 * 2. ** -23 if dtype == jnp.float32 or 'norm' not in how else 2. ** -7
  np.testing.assert_allclose(step, size, rtol=near if how else 2. ** -23)   # a division's last bit
  if not how:
    np.testing.assert_array_equal(codes, reference.encoded(x.astype(jnp.float32), step))
  else:
    assert np.abs(np.asarray(codes, int) - np.asarray(want, int)).max() <= 1
    # only what is near the middle of two codes may go to the other
    assert np.mean(np.asarray(codes) != np.asarray(want)) < 127 * near


def test_a_given_step_is_used_unless_a_row_has_a_nan():
  x, _ = operands((2, 33, 128))
  scale = jnp.array([.02, .1])
  x = x.at[1, 3, 5].set(jnp.nan)
  for got, want in zip(kernel(x, scale), api.quantize_rows(x, scale, implementation='reference')):
    np.testing.assert_array_equal(got, want)


def test_zeros_nans_and_infinities_are_what_the_reference_makes_of_them():
  x, _ = operands((4, 128))
  x = x.at[0].set(0).at[1, 3].set(jnp.nan).at[2, 7].set(jnp.inf)
  codes, step = kernel(x)
  want, size = reference.quantize_rows(x)
  np.testing.assert_array_equal(codes, want)
  np.testing.assert_array_equal(step, size)
  assert step[0, 0] == 1 and jnp.isnan(step[1, 0])


def test_rows_of_a_last_block_that_is_not_full_are_not_those_of_another(monkeypatch):
  monkeypatch.setattr(tpu, 'VMEM', 1)
  assert not tpu.rows(64, 128, 4)
  monkeypatch.setattr(tpu, 'VMEM', 32 * 128 * 22)          # one tile a block: three blocks
  x, _ = operands((70, 128))
  assert tpu.rows(70, 128, 4) == 32
  np.testing.assert_array_equal(kernel(x)[0], reference.quantize_rows(x)[0])


@pytest.mark.parametrize('shape', [(3, 8), (64, 512)])
def test_a_nan_is_kept_in_rows_of_any_length(shape):
  x, _ = operands(shape)
  step = jax.jit(api.quantize_rows)(x.at[1, 5].set(jnp.nan))[1]
  assert np.flatnonzero(np.isnan(step)).tolist() == [1]


def test_the_kernel_has_no_races():
  x, norm = operands((40, 128))
  how = given('both', norm)
  got = kernel(x, interpret=WATCHED, **how)
  np.testing.assert_array_equal(got[0], kernel(x, **how)[0])
  assert not seen()


@pytest.mark.parametrize('way', WAYS)
def test_the_kernel_packs_four_bits_as_the_reference(way):
  x, norm = operands((2, 37, 384))
  how = given(way, norm)
  values, step = kernel(x, bits=4, **how)
  want, size = api.quantize_rows(x, bits=4, implementation='reference', **how)
  assert values.dtype == jnp.uint8 and values.shape == (2, 37, 192)
  np.testing.assert_allclose(step, size, rtol=384 * 2. ** -23)            # as of eight bits
  off = np.abs(np.asarray(reference.unpacked(values, 384), int) - reference.unpacked(want, 384))
  assert off.max() <= 1 and np.mean(off > 0) < 7 * 384 * 2. ** -23 + 2 / off.size


@settings(deadline=None, max_examples=6)
@drawn(st.integers(1, 40), st.integers(1, 300), st.sampled_from([jnp.float32, jnp.bfloat16]),
       st.integers(0, 2 ** 31 - 1))
def test_four_bits_of_any_row_are_within_half_a_step_and_the_kernels(M, K, dtype, seed):
  x, _ = operands((M, K), seed, dtype)
  values, step = kernel(x, bits=4)
  assert values.shape == (M, -(-K // 2))
  codes = np.asarray(reference.unpacked(values, K))
  np.testing.assert_array_equal(codes, reference.encoded(x.astype(jnp.float32), step, 4))
  assert np.abs(codes).max() <= 7 and not np.any(values[:, K // 2:] >> 4 if K % 2 else 0)
  off = np.abs(codes * np.asarray(step, np.float64) - np.asarray(x, np.float64))
  assert np.all(off <= step * (.5 + 7 * 2. ** -22))        # a step and its inverse are rounded


def test_the_first_of_a_pair_is_in_the_lower_bits():
  x = jnp.array([[7., -7., 1., -2., 3.]])
  for run in (api.quantize_rows, kernel):
    values, step = run(x, bits=4)
    assert values.tolist() == [[0x97, 0xe1, 0x03]] and step == 1


def test_four_bits_have_no_races_and_take_steps_zeros_and_nans_as_eight_do():
  x, _ = operands((40, 256))
  x = x.at[0].set(0).at[1, 3].set(jnp.nan)
  how = dict(bits=4, scale=jnp.float32(.3))
  got = kernel(x, interpret=WATCHED, **how)
  for a, b in zip(got, api.quantize_rows(x, implementation='reference', **how)):
    np.testing.assert_array_equal(a, b)
  assert not seen()
  assert np.flatnonzero(np.isnan(got[1])).tolist() == [1]
  assert kernel(x, bits=4)[1][0] == 1
  y = api.rounded_rows(x, bits=4)
  assert np.isnan(y).all(axis=1).tolist() == [False, True] + [False] * 38
  gradient = jax.grad(lambda x: jnp.sum(api.rounded_rows(x, bits=4) * 3))(x)
  np.testing.assert_array_equal(gradient, jnp.full_like(x, 3))


def test_the_norm_is_the_one_of_the_blocks():
  x, norm = operands((5, 64))
  want = RMSNorm(1e-5, offset=1.).apply({'params': {'scale': norm}}, x)
  np.testing.assert_array_equal(reference.normed(x, norm, 1e-5, 1.), want)


def test_a_rotation_undoes_itself_and_spreads_an_outlier():
  x = jnp.zeros((1, 256)).at[0, 3].set(16.)
  turned = reference.rotated(x, 256)
  np.testing.assert_allclose(jnp.abs(turned), 1., rtol=1e-6)
  np.testing.assert_allclose(reference.rotated(turned, 256), x, atol=1e-5)


@pytest.mark.parametrize('way', WAYS)
def test_the_gradient_is_that_of_what_is_rounded(way):
  x, norm = operands((5, 128))
  how = given(way, norm)
  g = jax.random.normal(jax.random.key(0), x.shape)

  def rounded(x, norm):
    return jnp.sum(g * api.rounded_rows(x, **{**how, **({'norm': norm} if 'norm' in how else {})}))

  def exact(x, norm):
    if 'norm' in how:
      x = reference.normed(x, norm, how['epsilon'], how.get('offset', 0.))
    return jnp.sum(g * (reference.rotated(x, 128) if 'block' in how else x))
  for got, want in zip(*(jax.grad(f, (0, 1))(x, norm) for f in (rounded, exact))):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert float(jnp.abs(rounded(x, norm) - exact(x, norm))) > 0          # it does round


@pytest.mark.parametrize(('change', 'match'), [
    (lambda x, n: dict(x=x[0]), r'expected floats \[\.\.\. M K\]'),
    (lambda x, n: dict(x=x.astype(jnp.int32)), 'expected floats'),
    (lambda x, n: dict(x=x, scale=jnp.ones(3)), r'expected \(\), one a matrix'),
    (lambda x, n: dict(x=x, norm=n[:-1], epsilon=1e-6), r'expected \(256,\)'),
    (lambda x, n: dict(x=x, norm=n), 'give both or neither'),
    (lambda x, n: dict(x=x, bits=3), 'codes of 3 bits; there are: 8, 4'),
    (lambda x, n: dict(x=x, block=96), 'a power of two that divides'),
    (lambda x, n: dict(x=x, implementation='pallas'), 'runs on tpu, and this is cpu'),
    (lambda x, n: dict(x=x, implementation='fast'), 'there are: pallas, xla, reference')])
def test_what_does_not_fit_is_refused(change, match):
  x, norm = operands()
  with pytest.raises(ValueError, match=match):
    api.quantize_rows(**change(x, norm))
