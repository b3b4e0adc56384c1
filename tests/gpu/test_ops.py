"""Every op on an NVIDIA GPU against its reference on the CPU, on numbers that no run had before.

JAX_PLATFORMS=cuda,cpu pytest -n0 tests/gpu

Without a GPU they skip. The seed of a failed test is in its output.
"""
import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.attention_decode.api import Codes, attention_decode, attention_decode_paged
from lean_jax.kernels.distill_loss.api import distill_loss
from lean_jax.kernels.fake_quant.api import fake_quant
from lean_jax.kernels.grouped_matmul.api import grouped_matmul
from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.platforms import device
from lean_jax.kernels.quantize_rows.api import quantize_rows
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.kernels.weight_only_matmul import reference as weight_only_reference
from lean_jax.nn.rounded import Rounding, encoded
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.packing import pack
from lean_jax.quantization.spec import parse_spec


@pytest.fixture(autouse=True)
def _on_a_gpu():
  """Skips without one; products of float32 that are meant to be such."""
  if jax.default_backend() != 'gpu':
    pytest.skip('needs an NVIDIA GPU (JAX_PLATFORMS=cuda,cpu)')
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture
def rng():
  seed = secrets.randbits(32)
  print('seed', seed)
  return np.random.default_rng(seed)


def on_cpu(f, *args, **how):
  """f of arrays, on the CPU."""
  cpu = jax.devices('cpu')[0]
  with jax.default_device(cpu):
    args, how = jax.device_put((args, how), cpu)
    return jax.tree.map(np.asarray, f(*args, **how))


def needs_hopper(implementation):
  if implementation == 'pallas' and device.why_no_hopper():
    pytest.skip(device.why_no_hopper())


def near(got, want, atol, rtol=0.):
  np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=rtol,
                             atol=atol)


@pytest.mark.parametrize('implementation', ['pallas', 'xla', None])
@pytest.mark.parametrize(('M', 'K', 'N', 'batch'), [
    (128, 512, 256, ()), (1333, 1000, 1700, ()), (256, 256, 1024, (8,)), (4096, 4096, 4096, ())])
@pytest.mark.parametrize('activation', [None, 'relu', 'silu', 'gelu'])
def test_int8_matmul(rng, implementation, M, K, N, batch, activation):
  needs_hopper(implementation)
  if implementation == 'pallas' and M == 128:
    pytest.skip('not of the kernel')
  x = jnp.asarray(rng.normal(size=(*batch, M, K)), jnp.float32)
  values = jnp.asarray(rng.integers(-127, 128, (*batch, N, K)), jnp.int8)
  scale = jnp.asarray(rng.uniform(.1, 1, (*batch, 1, N)) / (100 * K ** .5), jnp.float32)
  bias = jnp.asarray(rng.normal(size=N), jnp.float32)
  run = functools.partial(int8.int8_matmul, layout='columns', activation=activation)
  got = jax.jit(functools.partial(run, implementation=implementation))(x, values, scale, bias=bias)
  want = on_cpu(functools.partial(run, implementation='xla'), x, values, scale, bias=bias)
  # The integers are exact, unless a code is next to one half: then it may be the other one.
  step = np.abs(np.asarray(x)).max(axis=-1, keepdims=True) / 127
  near(got, want, 1e-5 + (step * 127 * np.asarray(scale)).max(), 1e-5)
  assert np.mean(np.abs(np.asarray(got) - want) > 1e-5 + 1e-5 * np.abs(want)) < .01


@pytest.mark.parametrize('implementation', ['pallas', 'xla', None])
@pytest.mark.parametrize(('M', 'K', 'N', 'batch'), [
    (1, 4096, 4096, ()), (16, 1024, 192, ()), (200, 2048, 512, ()), (3, 512, 128, (4,))])
@pytest.mark.parametrize('scheme', ['w4a16-g128', 'w4a16-g64-asym', 'w4a16-g32', 'w4a16',
                                    'w8a16-g128', 'w8a16-g32-asym', 'w2a16-g64', 'nf4-g64'])
def test_weight_only_matmul(rng, implementation, M, K, N, batch, scheme):
  needs_hopper(implementation)
  spec = parse_spec(scheme)
  x = jnp.asarray(rng.normal(size=(*batch, M, K)), jnp.bfloat16)
  codes, scale, zero = formats.quantize(
      jnp.asarray(rng.normal(size=(*batch, K, N)), jnp.float32), spec)
  values = layouts.arranged(codes, spec, 'columns')
  if implementation == 'pallas' and not has_kernel(spec, x, values, scale):
    pytest.skip('not of the kernel')
  got = jax.jit(lambda *a: weight_only.weight_only_matmul(
      *a, spec, layout='columns', implementation=implementation))(x, values, scale, zero)
  want = on_cpu(lambda x, *a: weight_only_reference.weight_only_matmul(
      x.astype(jnp.float32), *a, spec, 'columns'), x, values, scale, zero)
  # One rounding to bfloat16; and one of each of K independent terms, where the weight is written
  # out, or of K / 16 sums below 4 K**.5, of which wgmma keeps 22 bits.
  written = implementation == 'xla' or not has_kernel(spec, x, values, scale)
  near(got, want, 2. ** -8 * 6 * K ** .5 if written else 2. ** -24 * K ** 1.5, 2. ** -8)


def has_kernel(spec, x, values, scale):
  return all(f.why_not is None for f in weight_only.forms(spec, 'columns', x, values, scale, None)
             if f.platforms == ('cuda',))


@pytest.mark.parametrize('how', [{}, dict(norm=True, epsilon=1e-6), dict(block=128)])
def test_quantize_rows(rng, how):
  x = jnp.asarray(rng.normal(size=(70, 512)), jnp.float32)
  how = dict(how, norm=jnp.asarray(rng.normal(size=512), jnp.float32)) if 'norm' in how else how
  codes, step = jax.jit(lambda x: quantize_rows(x, **how))(x)
  other, size = on_cpu(lambda x: quantize_rows(x, implementation='reference', **how), x)
  near(step, size, 0, 1e-5)
  assert np.abs(np.asarray(codes, int) - other).max() <= 1   # next to one half, the other code


@pytest.mark.parametrize('implementation', ['ragged', None])
def test_grouped_matmul(rng, implementation):
  sizes = jnp.asarray(rng.multinomial(300, [.5, 0, .3, .2]), jnp.int32)
  x = jnp.asarray(rng.normal(size=(300, 96)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(4, 96, 64)), jnp.float32)
  got = jax.jit(functools.partial(grouped_matmul, implementation=implementation))(x, w, sizes)
  near(got, on_cpu(functools.partial(grouped_matmul, implementation='reference'), x, w, sizes),
       2. ** -23 * 96 * 16)                                 # float32 sums of 96 terms below 16


def cache(rng, bits, N, S, K, g):
  """Codes of keys and values of N rows."""
  known = jnp.ones((N, S, 1), bool)
  draw = lambda: jnp.asarray(rng.normal(size=(N, S, K)), jnp.float32)
  return [Codes(*encoded(draw(), known, Rounding(bits, g), per_token=p)) for p in (False, True)]


@pytest.mark.parametrize(('implementation', 'dtype'), [
    ('xla', 'float32'), (None, 'float32'), ('pallas', 'bfloat16'), (None, 'bfloat16')])
@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize(('R', 'S', 'K', 'length'), [(8, 1024, 128, 900), (9, 4096, 256, 4096)])
def test_attention_decode(rng, implementation, dtype, bits, R, S, K, length):
  needs_hopper(implementation)
  q = jnp.asarray(rng.normal(size=(4, R, K)), dtype)
  k, v = cache(rng, bits, 4, S, K, K // 4)
  visible = jnp.asarray(rng.random((2, S)) < .9)
  run = functools.partial(attention_decode, bits=bits, length=length)
  got = jax.jit(functools.partial(run, implementation=implementation))(q, k, v, visible)
  want = on_cpu(functools.partial(run, implementation='reference'), q.astype(jnp.float32), k, v,
                visible)
  near(got, want, of_sums(dtype))


def of_sums(dtype):
  """How far attention to normal numbers may be off: by sums of 4096 float32; or by roundings to
  bfloat16 of keys, of values up to 5 and of the result, and scores of order 1 by as much."""
  return 1e-4 if dtype == 'float32' else 4 * 5 * 2 ** -8


@pytest.mark.parametrize(('implementation', 'dtype'), [(None, 'float32'), ('pallas', 'bfloat16')])
@pytest.mark.parametrize('bits', [8, 4])
def test_attention_decode_paged(rng, implementation, dtype, bits):
  needs_hopper(implementation)
  N, R, K, n, M, P = 3, 4, 128, 128, 4, 16
  q = jnp.asarray(rng.normal(size=(N, R, K)), dtype)
  k, v = cache(rng, bits, P, n, K, 32)
  table = jnp.asarray(rng.permutation(P)[:N * M].reshape(N, M), jnp.int32)
  lengths = jnp.asarray(rng.integers(1, n * M + 1, N), jnp.int32)
  run = functools.partial(attention_decode_paged, bits=bits)
  got = jax.jit(functools.partial(run, implementation=implementation))(q, k, v, table, lengths)
  near(got, on_cpu(functools.partial(run, implementation='reference'), q.astype(jnp.float32), k, v,
                   table, lengths), of_sums(dtype))


@pytest.mark.parametrize('scheme', ['w8a16', 'w4a16-g32', 'nf4-g64'])
def test_fake_quant(rng, scheme):
  w = jnp.asarray(rng.normal(size=(128, 96)), jnp.float32)
  run = lambda w: jax.value_and_grad(lambda w: jnp.sum(fake_quant(w, parse_spec(scheme)) * w))(w)
  got, want = jax.jit(run)(w), on_cpu(run, w)
  near(got[0], want[0], 0, 1e-4)
  near(got[1], want[1], 1e-5)


@pytest.mark.parametrize('kind', ['forward_kl', 'reverse_kl', 'jsd', 'top_k'])
def test_distill_loss(rng, kind):
  T, D, V = 70, 64, 1000
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * shape[0] ** -.5, jnp.float32)
  args = draw(T, D), draw(D, V), draw(T, D), draw(D, V)
  labels, how = jnp.asarray(rng.integers(0, V, T)), dict(k=5) if kind == 'top_k' else {}

  def loss(implementation, hs, ws, ht, wt, labels):
    return distill_loss(hs, ws, ht, wt, kind=kind, labels=labels, soft_weight=.5, chunk=32,
                        implementation=implementation, **how)[0]
  run = lambda name: jax.value_and_grad(functools.partial(loss, name), (0, 1))
  got, want = jax.jit(run(None))(*args, labels), on_cpu(run('reference'), *args, labels)
  near(got[0], want[0], 0, 1e-5)
  for a, b in zip(got[1], want[1]):
    near(a, b, 1e-5 * np.abs(b).max())


@pytest.mark.parametrize('implementation', ['pallas', 'xla'])
def test_nan_reaches_its_row_alone(rng, implementation):
  needs_hopper(implementation)
  x = jnp.asarray(rng.normal(size=(2048, 256)), jnp.bfloat16).at[1, 3].set(jnp.nan)
  values = jnp.asarray(rng.integers(-127, 128, (1024, 256)), jnp.int8)
  y = int8.int8_matmul(x, values, jnp.ones((1, 1024)), layout='columns',
                       implementation=implementation)
  few = weight_only.weight_only_matmul(x[:3], values[:, :128].view(jnp.uint8), jnp.ones((2, 1024)),
                                       None, parse_spec('w4a16-g128'), layout='columns',
                                       implementation=implementation)
  for got in (y, few):
    assert np.isnan(got[1]).all() and not np.isnan(got[0]).any() and not np.isnan(got[2:]).any()


def test_four_bits_of_int8_matmul(rng):
  x = jnp.asarray(rng.normal(size=(9, 64)), jnp.float32)
  values = jnp.asarray(rng.integers(-8, 8, (64, 40)), jnp.int8)
  scale = jnp.asarray(rng.uniform(.01, .02, (2, 40)), jnp.float32)
  got = jax.jit(functools.partial(int8.int8_matmul, group=32))(x, pack(values, 4), scale)
  want = on_cpu(functools.partial(int8.int8_matmul, group=32), x, values, scale)
  near(got, want, 32 * 8 * .02 / 127)                       # a code next to one half
