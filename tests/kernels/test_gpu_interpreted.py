"""The GPU kernels in Mosaic GPU's interpreter, which raises where two threads race.

Its wgmma is done at once, and what that reads is not among what may race.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.attention_decode import api as attention
from lean_jax.kernels.int8_matmul import api as int8_api
from lean_jax.kernels.int8_matmul import gpu
from lean_jax.kernels.platforms import hopper
from lean_jax.kernels.weight_only_matmul import gpu as weight_only
from lean_jax.kernels.weight_only_matmul import reference
from lean_jax.quantization import formats, layouts
from lean_jax.quantization.spec import parse_spec

interpreted = pytest.mark.skipif(jax.__version_info__ < (0, 11),
                                 reason='the interpreter came with JAX 0.11')


def interpreter():
  return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))


@interpreted
def test_the_interpreter_finds_a_race():
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as state

  def kernel(x, y, block, there):
    plgpu.copy_gmem_to_smem(x, block, there)
    y[...] = block[...]                                    # before it is known to be there
    plgpu.barrier_wait(there)
  run = plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
                     scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()])
  with interpreter():
    with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
      jax.block_until_ready(run(jnp.ones(128)))
    state.reset_gpu_interpret_mode_state()


@interpreted
@pytest.mark.parametrize(('M', 'N', 'K', 'cores'), [(5, 40, 128, 1), (257, 200, 700, 3),
                                                    (300, 130, 128, 1)])
def test_sums_are_exact_whatever_fills_blocks(monkeypatch, M, N, K, cores):
  monkeypatch.setattr(gpu, 'CORES', cores)                 # each then has several blocks
  rng = np.random.default_rng(M)
  codes, values = (rng.integers(-127, 128, s).astype(np.int8) for s in ((M, K), (N, K)))
  rows, columns = (rng.uniform(.1, 1, n).astype(np.float32) for n in (M, N))
  with interpreter():
    got = gpu.scaled_product(*map(jnp.asarray, (codes, values, rows, columns)))
  sums = codes.astype(np.int64) @ values.T.astype(np.int64)
  # two float32 roundings after an exact sum
  np.testing.assert_allclose(got, sums * rows[:, None].astype(np.float64) * columns, rtol=3e-7)


@interpreted
def test_experts_a_bias_and_an_activation_are_those_of_the_reference():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, 40)), jnp.float32)
  values = jnp.asarray(rng.integers(-127, 128, (2, 8, 40)), jnp.int8)
  scale = jnp.asarray(rng.uniform(.01, .02, (2, 1, 8)), jnp.float32)
  bias = jnp.asarray(rng.normal(size=8), jnp.float32)
  with interpreter():
    got = gpu.int8_matmul(x, values, scale, jnp.asarray([.02, .03]), bias.reshape(1, 8),
                          activation=jax.nn.relu, dtype=jnp.bfloat16)
  want = int8_api.int8_matmul(x, values, scale, x_scale=jnp.asarray([.02, .03]), bias=bias,
                              activation='relu', layout='columns', implementation='reference')
  # a rounding to bfloat16
  np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2. ** -8, atol=1e-6)


def test_values_that_do_not_lie_along_k_are_refused():
  codes = jnp.zeros((4, 128), jnp.int8)
  with pytest.raises(ValueError, match=r'int8 \[N K\]'):
    gpu.scaled_product(codes, jnp.zeros((128, 64), jnp.int8), jnp.ones(4), jnp.ones(128))


def operands(scheme, M, K, N, batch=(), seed=0):
  rng, spec = np.random.default_rng(seed), parse_spec(scheme)
  x = jnp.asarray(rng.normal(size=(*batch, M, K)), jnp.bfloat16)
  codes, scale, zero = formats.quantize(
      jnp.asarray(rng.normal(size=(*batch, K, N)), jnp.float32), spec)
  return x, layouts.arranged(codes, spec, 'columns'), scale, zero, spec


@pytest.mark.parametrize('scheme', ['w2a16-g64-asym', 'w4a16-g32', 'w8a16-g16-asym', *(
    pytest.param(name, marks=pytest.mark.slow) for name in (
        'w2a16-g64', 'w4a16-g32-asym', 'w8a16-g16'))])
def test_masked_bits_are_the_codes(scheme):
  _, values, _, _, spec = operands(scheme, 1, 64, 64)
  bits, each = int(spec.bits), 16 // int(spec.bits)
  words = jax.lax.bitcast_convert_type(values.reshape(64, -1, 2), jnp.int16)
  got = jnp.stack(hopper.numbers(words, bits, spec.symmetric), axis=1)
  places = jnp.arange(each).reshape(1, 1, each) % (8 // bits)
  got = jnp.swapaxes(got, 1, 2) * 2. ** (-bits * places)
  codes = layouts.codes_of(values, spec, 64, 'columns').astype(jnp.float32).T
  np.testing.assert_array_equal(got.reshape(64, 64), codes - layouts.offset(spec))


def through_shared_memory(codes, x, start):
  """`multiplied` where the interpreter can follow: it has no left side of wgmma in registers."""
  codes = jnp.concatenate(codes, axis=1)
  N, width = codes.shape

  def staged(left):
    left[...] = codes
    plgpu.commit_smem()

    def product(sums):
      plgpu.wgmma(sums, left, x.at[:, pl.ds(start, width)].T)
      return sums[...]
    return pl.run_scoped(product, plgpu.ACC((N, x.shape[0]), jnp.float32))
  return pl.run_scoped(staged, plgpu.SMEM(codes.shape, jnp.bfloat16))


@interpreted
@pytest.mark.parametrize(('scheme', 'M', 'K', 'N', 'split'), [
    ('w4a16-g128', 1, 1024, 128, 2), ('w4a16-g64-asym', 5, 512, 64, None),
    ('w4a16-g32', 3, 96, 64, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('w4a16', 2, 256, 64, None), ('w8a16-g64', 9, 128, 128, 1),
        ('w8a16-g16-asym', 2, 64, 64, None), ('w2a16-g64-asym', 70, 128, 64, 1)))])
def test_weight_only_matmul_equals_the_reference(monkeypatch, scheme, M, K, N, split):
  monkeypatch.setattr(hopper, 'multiplied', through_shared_memory)
  x, values, scale, zero, spec = operands(scheme, M, K, N)
  with interpreter():
    got = weight_only.weight_only_matmul(x, values, scale, zero, spec, split=split)
  want = reference.weight_only_matmul(x.astype(jnp.float32), values, scale, zero, spec, 'columns')
  # one rounding to bfloat16; sums in float32 of K products, each below |x| times the range
  terms = jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True) * 2 ** spec.bits
  bound = 2. ** -8 * jnp.abs(want) + 2. ** -23 * 4 * terms * scale.max()
  assert got.dtype == x.dtype and np.all(np.abs(got.astype(jnp.float32) - want) <= bound)


@pytest.mark.slow
@interpreted
def test_weight_only_matmul_has_axes_of_experts(monkeypatch):
  monkeypatch.setattr(hopper, 'multiplied', through_shared_memory)
  x, values, scale, zero, spec = operands('w4a16-g64', 2, 64, 64, (2,))
  with interpreter():
    got = weight_only.weight_only_matmul(x, values, scale, zero, spec)
    one = weight_only.weight_only_matmul(x[1], values[1], scale[1], zero, spec)
  np.testing.assert_array_equal(got[1], one)


def cached(bits, N, S, K, C, g, seed=0):
  """Codes of keys and of values of N rows, numbers from -9 to 1; keys' scales are powers of two."""
  draw = np.random.default_rng(seed)
  codes = lambda: jnp.asarray(draw.integers(0, 256, (N, S * bits // 8, K)), jnp.uint8)
  of = lambda x: jnp.asarray(x * 2. ** (3 - bits), jnp.float16)
  least = lambda *shape: jnp.asarray(draw.uniform(-9, -7, shape), jnp.float16)
  return (attention.Codes(codes(), of(2. ** draw.integers(-2, 1, (N, S // g, K))),
                          least(N, S // g, K)),
          attention.Codes(codes(), of(draw.uniform(.2, 1, (N, S, C))), least(N, S, C)))


def sixteenths(*shape):
  return jnp.asarray(np.random.default_rng(1).integers(-16, 17, shape) / 16, jnp.bfloat16)


@pytest.fixture
def hopper_attention(monkeypatch):
  """attention_decode by the kernel, as the interpreter can follow, in two blocks or one a row."""
  def chosen(op, forms, implementation):
    del op
    of = (lambda f: f.platforms == ('cuda',)) if implementation is None else (
        lambda f: f.name == implementation)
    return next(f.run for f in forms if of(f))
  monkeypatch.setattr(hopper, 'multiplied', through_shared_memory)
  monkeypatch.setattr(hopper, 'CORES', 1)
  monkeypatch.setattr(attention, 'chosen', chosen)


def assert_attended(run, q):
  """That run of q is what its reference is, but for what the kernel rounds.

  Products of q and keys' scales are exact in bfloat16. One rounding is of each probability times
  what it meets, which is 4 at most: half the range of codes, or a recent value; and one of the
  result. Sums of scores are float32, of 256 terms of 9 or less that scale by 1 / 11, and move what
  lies within 10 by as much of it.
  """
  with interpreter():
    got = np.asarray(run(q), np.float64)
  want = np.asarray(run(q.astype(jnp.float32), implementation='reference'), np.float64)
  scores = 256 * 9 / 11 * 2. ** -23
  bound = 2. ** -8 * (4 + np.abs(want)) + 2 * 10 * scores
  assert got.shape == q.shape and np.all(np.abs(got - want) <= bound)


@interpreted
@pytest.mark.parametrize(('bits', 'R', 'S', 'K', 'C', 'g', 'length'), [
    (8, 4, 384, 128, 4, 32, 288), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (4, 9, 256, 128, 1, 64, 256), (8, 1, 512, 256, 8, 256, 256), (4, 8, 128, 256, 4, 64, 0)))])
def test_a_layers_codes_and_recent_tokens_are_attended_to(hopper_attention, bits, R, S, K, C, g,
                                                          length):
  rng = np.random.default_rng(2)
  near = tuple(jnp.asarray(rng.uniform(-4, 4, (1, g, K)), jnp.bfloat16) for _ in 'kv')
  seen = jnp.asarray(rng.random((1, S)) < .8)
  layers = [cached(bits, 1, S, K, C, g, seed) for seed in range(3)]
  k, v = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  assert_attended(functools.partial(
      attention.attention_decode, k=k, v=v, visible=seen, bits=bits, length=length, layer=1,
      recent=near, softcap=20., sinks=jnp.asarray(rng.normal(size=(1, R)), jnp.float32)),
                  sixteenths(1, R, K))


@interpreted
@pytest.mark.parametrize(('bits', 'R', 'n', 'lengths', 'window'), [
    (4, 2, 128, [0, 129, 1], 100), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (8, 12, 256, [256, 300, 512], None), (4, 4, 384, [7, 768, 400], 600)))])
def test_pages_are_attended_to_as_far_as_rows_go(hopper_attention, bits, R, n, lengths, window):
  k, v = cached(bits, 7, n, 128, 4, 32)
  table, ends = jnp.asarray([[6, 6], [5, 3], [2, 6]]), jnp.asarray(lengths)
  assert_attended(functools.partial(attention.attention_decode_paged, k=k, v=v, table=table,
                                    lengths=ends, bits=bits, window=window),
                  sixteenths(3, R, 128))
