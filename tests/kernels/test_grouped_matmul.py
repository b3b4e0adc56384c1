"""grouped_matmul: every implementation is the product of each group by itself."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.grouped_matmul import api
from lean_jax.kernels.int8_matmul import api as int8_api
from lean_jax.kernels.native import library
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.spec import parse_spec

SIZES = {'uneven': (3, 0, 17, 1, 0, 43), 'one takes all': (0, 40, 0), 'a row each': (1,) * 5,
         'the last alone': (0, 0, 0, 2), 'few rows': (0, 1, 0, 0, 1, 0, 0, 0), 'blocks': (128, 70)}
FORMS = (*(f for f in api.IMPLEMENTATIONS if f != 'pallas'), None)   # that: test_grouped_tpu.py


def operands(sizes, I=7, O=5, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(sum(sizes), I)).astype(np.float32)
  w = rng.normal(size=(len(sizes), I, O)).astype(np.float32)
  return jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32)


def loop(x, w, sizes, dy=None):
  """The product in float64, a group at a time; with dy, the gradients of x and w."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  cuts = np.cumsum([0, *sizes])
  at = [slice(a, b) for a, b in itertools.pairwise(cuts)]
  if dy is None:
    return np.concatenate([x[s] @ w[e] for e, s in enumerate(at)])
  dy = np.asarray(dy, np.float64)
  return (np.concatenate([dy[s] @ w[e].T for e, s in enumerate(at)]),
          np.stack([x[s].T @ dy[s] for s in at]))


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('form', FORMS)
def test_rows_are_multiplied_by_the_matrix_of_their_group(form, sizes):
  args = operands(sizes)
  got = jax.jit(functools.partial(api.grouped_matmul, implementation=form))(*args)
  np.testing.assert_allclose(got, loop(*args), atol=1e-5)    # float32 sums of 7 terms of order 1


@pytest.mark.parametrize('sizes', SIZES.values(), ids=SIZES)
@pytest.mark.parametrize('form', FORMS)
def test_gradients_are_those_of_the_product(form, sizes):
  x, w, sizes = operands(sizes)
  dy = jax.random.normal(jax.random.key(0), (x.shape[0], w.shape[2]))
  total = lambda x, w: jnp.sum(dy * api.grouped_matmul(x, w, sizes, implementation=form))
  got = jax.jit(jax.grad(total, (0, 1)))(x, w)
  for ours, want in zip(got, loop(x, w, sizes, dy)):
    np.testing.assert_allclose(ours, want, atol=5e-5)        # sums of up to 128 terms


@pytest.mark.parametrize('form', FORMS)
def test_a_nan_stays_in_its_row_and_in_the_gradient_of_its_group(form):
  x, w, sizes = operands((3, 4, 2))
  x = x.at[4].set(jnp.nan)
  y, pull = jax.vjp(lambda w: api.grouped_matmul(x, w, sizes, implementation=form), w)
  assert jnp.isnan(y).any(axis=1).tolist() == [k == 4 for k in range(9)]
  dw, = pull(jnp.ones_like(y))
  if form in ('blocks', None):                 # ragged_dot's own multiplies it by a mask of zeros
    assert jnp.isnan(dw).any(axis=(1, 2)).tolist() == [False, True, False]


@pytest.mark.parametrize('form', FORMS)
def test_matrices_are_made_of_parts_and_gradients_reach_the_float_ones(form):
  x, w, sizes = operands((4, 0, 3))
  codes = jnp.round(20 * w).astype(jnp.int8)
  scale = jnp.full((3, 1, 5), .05)
  matrix = lambda part: part['codes'] * part['scale']
  run = functools.partial(api.grouped_matmul, matrix=matrix, implementation=form)
  got = run(x, dict(codes=codes, scale=scale), sizes)
  np.testing.assert_allclose(got, loop(x, codes * scale, sizes), atol=1e-5)
  total = lambda x, scale: jnp.sum(run(x, dict(codes=codes, scale=scale), sizes) ** 2)
  dense = lambda x, scale: jnp.sum(api.grouped_matmul(
      x, codes * scale, sizes, implementation='reference') ** 2)
  for a, b in zip(jax.grad(total, (0, 1))(x, scale), jax.grad(dense, (0, 1))(x, scale)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('form', FORMS)
def test_sums_of_bytes_are_exact_and_those_of_bfloat16_are_rounded_once(form):
  rng = np.random.default_rng(0)
  x, w, sizes = operands((5, 0, 9), I=40)
  run = functools.partial(api.grouped_matmul, implementation=form)
  x8, w8 = (jnp.asarray(rng.integers(-127, 128, a.shape), jnp.int8) for a in (x, w))
  got = run(x8, w8, sizes)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, loop(x8, w8, sizes))
  x16, w16 = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  got = run(x16, w16, sizes)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(got, np.float32), loop(x16, w16, sizes), rtol=2 ** -8,
                             atol=1e-5)


def test_vmap_and_scan_compute_what_calls_do():
  x, w, sizes = operands((3, 0, 6))
  two = lambda a: jnp.stack([a, 2 * a])
  want = [loop(x, w, sizes), loop(2 * x, 2 * w, sizes)]
  got = jax.vmap(api.grouped_matmul, (0, 0, None))(two(x), two(w), sizes)
  np.testing.assert_allclose(got, want, atol=1e-5)
  _, got = jax.lax.scan(lambda _, a: (None, api.grouped_matmul(*a, sizes)), None, (two(x), two(w)))
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('change', [
    lambda x, w, s: (x[:, :-1], w, s), lambda x, w, s: (x, w[0], s), lambda x, w, s: (x, w, s[:1])])
def test_operands_that_do_not_fit_are_refused(change):
  with pytest.raises(ValueError, match='expected'):
    api.grouped_matmul(*change(*operands((3, 4))))


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match='there are'):
    api.grouped_matmul(*operands((3, 4)), implementation='fast')


@pytest.mark.skipif(library.why_not() is not None, reason='there are no native kernels')
@pytest.mark.parametrize('layout', ['packed', pytest.param('panels', marks=pytest.mark.skipif(
    not library.takes_panels(), reason='no kernel here reads panels'))])
@pytest.mark.parametrize('scheme', ['w4a16-g32-asym', 'w8a16', 'nf4-g32-dq', 'w4a8-g32', 'w8a8'])
def test_experts_in_codes_are_multiplied_as_they_are_on_a_cpu(scheme, layout):
  sizes, spec = (1, 0, 21, 3), parse_spec(scheme)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(sum(sizes), 96)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(len(sizes), 96, 128)), jnp.float32)
  codes, scale, zero = formats.quantize(w, spec)
  sizes = jnp.asarray(sizes, jnp.int32)
  eight = spec.activation_bits == 8
  wide = scale if hasattr(scale, 'dtype') else scale.astype(jnp.float32)
  of = lambda layout: layouts.arranged(codes, spec, layout)

  def product(x, scale, layout, form):
    if eight:
      return int8_api.int8_grouped_matmul(x, of(layout), scale, sizes, group=spec.group,
                                          layout=layout, implementation=form)
    return api.grouped_weight_only(x, of(layout), scale, zero, spec, sizes, layout=layout,
                                   implementation=form)
  want = product(x, wide, 'packed', 'xla' if eight else 'reference')
  got = product(x, wide, layout, 'native')
  # 96 products of float32 in another order; of a zero point, with codes up to 15
  np.testing.assert_allclose(got, want, rtol=0, atol=2. ** -23 * 96 * float(jnp.abs(want).max()))
  assert 'ffi_call' in str(jax.make_jaxpr(lambda x: product(x, wide, layout, None))(x))
  of_x, of_scale = jax.grad(lambda *a: jnp.sum(jnp.sin(product(*a, layout, None))), (0, 1))(x, wide)
  by_x, by_scale = jax.grad(lambda *a: jnp.sum(jnp.sin(product(
      *a, 'packed', 'xla' if eight else 'ragged'))), (0, 1))(x, wide)
  np.testing.assert_allclose(of_x, by_x, rtol=1e-4, atol=1e-3)
  np.testing.assert_allclose(of_scale, by_scale, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(library.why_not() is not None, reason='there are no native kernels')
def test_sizes_of_more_rows_than_there_are_stop_the_kernel():
  spec = parse_spec('w8a16')
  codes, scale, zero = formats.quantize(jnp.ones((2, 8, 64)), spec)
  with pytest.raises(Exception, match='sizes are more than there are rows'):
    jax.block_until_ready(api.grouped_weight_only(
        jnp.ones((3, 8)), codes, scale, zero, spec, jnp.asarray([2, 2], jnp.int32),
        implementation='native'))
