"""weight_only_matmul: every implementation is the reference, and gradients are the dense ones."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.native import library
from lean_jax.kernels.weight_only_matmul import api, cpu, reference
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.packing import pack
from lean_jax.quantization.spec import parse_spec
from tests.kernels import levels

native = pytest.mark.skipif(library.why_not() is not None,
                            reason=f'the native kernels: {library.why_not()}')
SCHEMES = ('w8a16', 'w4a16-g8', 'w4a16-g8-asym', 'w3a16-g8', 'w2a16-g8', 'nf4-g16', 'nf4-g8-dq',
           'fp4-g8', 'fp8', 'w1.58a16', 'w1a16', 'mxfp4')


def operands(scheme, shape=(3, 20, 6), seed=0, dtype=jnp.float32):
  *batch, M, K, N = shape
  spec, rng = parse_spec(scheme), np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(*batch, M, K)), dtype)
  w = jnp.asarray(rng.normal(size=(*batch, K, N)), jnp.float32)
  if spec.code == 'mxfp4':
    x, w = (jnp.concatenate([a, a], axis=axis) for a, axis in ((x, -1), (w, -2)))
  codes, scale, zero = formats.quantize(w, spec)
  return x, pack(codes, spec.bits), scale, zero, spec


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('shape', [(3, 20, 6), (2, 1, 17, 5)])
def test_an_implementation_equals_the_reference(scheme, shape):
  given = operands(scheme, shape)
  want = reference.weight_only_matmul(*given)
  for implementation in (None, 'xla'):
    got = api.weight_only_matmul(*given, implementation=implementation)
    # K products of float32, added in another order
    bound = 2. ** -23 * 40 * float(jnp.abs(given[0]).sum(-1).max()) * 4
    np.testing.assert_allclose(got, want, atol=bound, rtol=0)


@levels.EACH
@pytest.mark.parametrize('scheme', ['w8a16', 'w8a16-g32-asym', 'w4a16-g32', 'w4a16-g32-asym',
                                    'w2a16-g32', 'nf4-g32-dq', 'fp4-g32', 'mxfp4', 'w4a16-tensor'])
def test_every_level_of_the_native_kernel_equals_the_reference(level, scheme):
  # Few rows and many, columns past a panel, a last group that is shorter.
  for shape in ((1, 136, 70), (3, 112, 64), (2, 7, 65, 130), (20, 600, 128)):
    if scheme == 'mxfp4' and shape[-2] % 16:
      continue
    x, values, scale, zero, spec = operands(scheme, shape)
    want = reference.weight_only_matmul(x, values, scale, zero, spec)
    # K products of float32 in another order; of a zero point, products with codes up to 2 ** bits
    bound = 2. ** -23 * x.shape[-1] ** .5 * 8 * float(jnp.abs(want).max())
    got = cpu.weight_only_matmul(x, values, scale, zero, spec, level)
    np.testing.assert_allclose(got, want, atol=bound, rtol=0)
    K, N = x.shape[-1], values.shape[-1]
    if library.takes_panels(level) and layouts.has_panels(spec, K, N):
      got = cpu.weight_only_matmul(x, layouts.laid_out(values, spec, 'panels'), scale, zero, spec,
                                   level)
      np.testing.assert_allclose(got, want, atol=bound, rtol=0)


@levels.EACH
def test_a_power_of_two_that_is_none_is_a_nan_of_its_group_alone(level):
  x, values, scale, zero, spec = operands('mxfp4', (2, 48, 70))      # inputs twice: groups of 32
  got = cpu.weight_only_matmul(x, values, scale.at[1, 3].set(255), zero, spec, level)
  np.testing.assert_array_equal(np.isnan(got), np.tile(np.arange(70) == 3, (2, 1)))


@native
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('scheme', ['w8a16-g32-asym', 'w4a16-g32', 'nf4-g32'])
def test_short_activations_are_multiplied_as_they_are(dtype, scheme):
  # None of their bits is lost: what is rounded is the result alone.
  x, values, scale, zero, spec = operands(scheme, (17, 96, 70), dtype=dtype)
  want = reference.weight_only_matmul(x.astype(jnp.float32), values, scale, zero, spec)
  got = api.weight_only_matmul(x, values, scale, zero, spec, implementation='native')
  bound = float(jnp.finfo(dtype).eps) / 2 + 2. ** -23 * 80
  np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=0,
                             atol=bound * float(jnp.abs(want).max()))


@native
@pytest.mark.parametrize('rows', [3, 20])
def test_activations_that_are_not_finite_reach_their_rows_alone(rows):
  x, values, scale, _, spec = operands('w4a16-g8', (rows, 24, 70))
  x = x.at[1, 2].set(jnp.nan).at[2, 5].set(jnp.inf)
  y = api.weight_only_matmul(x, values, scale, None, spec, implementation='native')
  want = reference.weight_only_matmul(x, values, scale, None, spec)
  assert np.isnan(y[1]).all()
  np.testing.assert_array_equal(np.isnan(y[2]), np.isnan(want[2]))
  assert np.isfinite(np.delete(y, (1, 2), 0)).all()


@native
def test_rows_and_columns_past_a_part_are_summed():
  for scheme, M in (('w4a16-g64', 1), ('nf4-g64', 4), ('w8a16', 1)):
    given = operands(scheme, (M, 600, 4170))
    want = reference.weight_only_matmul(*given)
    got = api.weight_only_matmul(*given, implementation='native')
    np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0)


@native
def test_it_is_batched_and_differentiated_as_xla_is():
  x, values, scale, _, spec = operands('w4a16-g8', (2, 3, 16, 6))
  one = lambda x, v, s: jnp.sum(api.weight_only_matmul(x, v, s, None, spec) ** 2)
  each = jax.vmap(jax.grad(one))(x, values, scale)
  want = [jax.grad(one)(x[k], values[k], scale[k]) for k in range(2)]
  np.testing.assert_allclose(each, jnp.stack(want), rtol=1e-5)


@pytest.mark.parametrize('scheme', ['w4a16-g8-asym', 'nf4-g8-dq', 'w8a16'])
def test_gradients_are_those_of_the_weight_written_out(scheme):
  x, values, scale, zero, spec = operands(scheme)
  dense = lambda x, s: jnp.sum(jnp.sin(
      x @ reference.matrix(values, s, zero, spec, x.shape[-1], jnp.float32)))
  ours = lambda x, s: jnp.sum(jnp.sin(api.weight_only_matmul(x, values, s, zero, spec)))
  grads = [jax.grad(f, (0, 1), allow_int=True)(x, scale) for f in (ours, dense)]
  for got, want in zip(*map(jax.tree.leaves, grads)):
    if got.dtype != jax.dtypes.float0:
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('change', 'match'), [
    (lambda x, v, s, z, p: (x[:, :-2], v, s, z, p), r'packs 18 rows .* into 9: expected'),
    (lambda x, v, s, z, p: (x, v, s[:-1], z, p), r'expected \(3, 6\)'),
    (lambda x, v, s, z, p: (x, v, s, z[:, :-1], p), 'and zero the same')])
def test_operands_that_do_not_fit_are_refused(change, match):
  with pytest.raises(ValueError, match=match):
    api.weight_only_matmul(*change(*operands('w4a16-g8-asym')))


def test_what_does_not_run_here_says_what_does():
  with pytest.raises(ValueError, match="'fast'; there are: native, pallas, xla, reference"):
    api.weight_only_matmul(*operands('w4a16-g8'), implementation='fast')
  with pytest.raises(ValueError, match='fp8 is not of 2, 4, 8 bits .*; here there are: xla'):
    api.weight_only_matmul(*operands('fp8'), implementation='native')
