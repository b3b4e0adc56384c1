"""Which products an NVIDIA Hopper multiplies with a kernel, and why not the others."""
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lean_jax.kernels.attention_decode import api as attention
from lean_jax.kernels.int8_matmul import api as int8
from lean_jax.kernels.platforms import device
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.quantization import layouts
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense
from lean_jax.weights.prepared import prepare

of = jax.ShapeDtypeStruct


def program(run, *shapes, target='h200'):
  """The text of the program that CUDA devices of a kind run."""
  with device.target(target):
    return jax.jit(run).trace(*shapes).lower(lowering_platforms=('cuda',)).as_text()


def int8_shapes(M=1024, K=256, N=2048, batch=(), G=1):
  return (of((*batch, M, K), jnp.bfloat16), of((*batch, N, K), jnp.int8),
          of((*batch, G, N), jnp.float32))


def weight_only_call(scheme, M=1, K=256, N=128, batch=(), layout='columns', dtype=jnp.bfloat16):
  spec = parse_spec(scheme)
  G = K // spec.group if spec.group else 1
  stored = (layouts.element(spec) if layout == 'int4' else
            jnp.int8 if spec.bits == 8 and spec.symmetric else jnp.uint8)
  shapes = [of((*batch, M, K), dtype), of(layouts.shape(batch, K, N, spec, layout), stored),
            of((*batch, G, N), jnp.bfloat16)]
  if not spec.symmetric:
    shapes.append(of((*batch, G, N), jnp.uint8))
  return (lambda x, v, s, z=None: weight_only.weight_only_matmul(x, v, s, z, spec, layout=layout),
          shapes)


@pytest.mark.parametrize(('target', 'batch'), [('h100', ()), ('h200', (3,))])
def test_a_hopper_multiplies_eight_bits_with_the_kernel(target, batch):
  run = lambda x, v, s: int8.int8_matmul(x, v, s, layout='columns', activation='silu',
                                         bias=jnp.ones(2048), dtype=jnp.bfloat16)
  assert 'mosaic_gpu' in program(run, *int8_shapes(batch=batch), target=target)


@pytest.mark.parametrize(('scheme', 'batch'), [
    ('w4a16-g128', ()), ('w4a16-g64-asym', (2,)), ('w4a16', ()), ('w8a16-g64', ()),
    ('w2a16-g128', ())])
def test_a_hopper_multiplies_weights_of_few_bits_with_the_kernel(scheme, batch):
  run, shapes = weight_only_call(scheme, batch=batch)
  assert 'mosaic_gpu' in program(run, *shapes)


@pytest.mark.parametrize(('how', 'why'), [
    (dict(M=128, N=16384), 'more than 128 rows'), (dict(N=1920), 'at least 64 blocks'),
    (dict(G=2, K=256), 'groups of 128 rows')])
def test_other_int8_products_are_xlas(how, why):
  shapes, group = int8_shapes(**how), 128 if 'G' in how else None
  run = lambda x, v, s, **kw: int8.int8_matmul(x, v, s, layout='columns', group=group, **kw)
  assert 'mosaic_gpu' not in program(run, *shapes)
  with pytest.raises(ValueError, match=f"'pallas': .*{why}.*; here there are: xla"):
    program(lambda *a: run(*a, implementation='pallas'), *shapes)


@pytest.mark.parametrize(('scheme', 'how', 'why'), [
    ('w8a16', {}, 'XLA widens'), ('nf4-g64', {}, 'integers of 2, 4 or 8 bits'),
    ('w3a16-g64', {}, 'integers of 2, 4 or 8 bits'), ('w4a16-g64', dict(M=513), 'up to 512 rows'),
    ('w4a16-g64', dict(N=96), 'multiple of 64 columns'), ('w4a16-g8', {}, 'groups of 16'),
    ('w4a16-g64', dict(layout='int4'), "layout 'columns'"),
    ('w4a16-g64', dict(dtype=jnp.float32), 'bfloat16')])
def test_other_weights_are_xlas(scheme, how, why):
  run, shapes = weight_only_call(scheme, **how)
  assert 'mosaic_gpu' not in program(run, *shapes)
  spec, layout = parse_spec(scheme), how.get('layout', 'columns')
  with device.target('h200'):
    kernel, = (f for f in weight_only.forms(spec, layout, *shapes[:3], None)
               if f.platforms == ('cuda',))
  assert why in kernel.why_not


@pytest.mark.parametrize('scheme', ['w4a16-g128', 'w4a16-g64-asym', 'w8a8'])
def test_a_prepared_weight_is_multiplied_by_the_kernel(scheme):
  w = prepare({'w': rtn(Dense(jnp.ones((256, 2048)), 'io', (None, None)), scheme)}, 'gpu')['w']
  x = of((1024 if scheme == 'w8a8' else 1, 256), jnp.bfloat16)
  run = lambda w, x: jax.grad(lambda x: jnp.sum(w.einsum('bi,io->bo', x).astype(jnp.float32)))(x)
  assert 'mosaic_gpu' in program(lambda w, x: w.einsum('bi,io->bo', x), w, x)
  assert program(run, w, x)


def attention_call(R=4, K=128, S=256, C=4, g=32, bits=8, dtype=jnp.bfloat16, paged=False):
  """The call of an op, its shapes: a cache of 6 rows, or 3 rows of pages of a pool of 6."""
  grid = lambda *shape: (of(shape, jnp.float16),) * 2
  codes = of((6, S * bits // 8, K), jnp.uint8)
  k, v = (attention.Codes(codes, *x) for x in (grid(6, S // g, K), grid(6, S, C)))
  if paged:
    return (lambda *a, **kw: attention.attention_decode_paged(*a, bits=bits, **kw)), (
        of((3, R, K), dtype), k, v, of((3, 2), jnp.int32), of((3,), jnp.int32))
  return (lambda *a, **kw: attention.attention_decode(*a, bits=bits, **kw)), (
      of((6, R, K), dtype), k, v, of((2, S), bool))


@pytest.mark.parametrize('how', [
    {}, dict(bits=4, paged=True), dict(R=9, K=256, C=8, g=128), dict(C=1, g=256)])
def test_a_hopper_attends_to_codes_with_the_kernel(how):
  run, shapes = attention_call(**how)
  assert 'mosaic_gpu' in program(run, *shapes, target='h100')


@pytest.mark.parametrize(('how', 'why'), [
    (dict(dtype=jnp.float32), 'queries in bfloat16'),
    (dict(K=64, C=2), '128 or 256 channels'), (dict(C=8), '32 channels'),
    (dict(S=192), 'pages of 192 tokens'), (dict(g=16), 'groups of 16'),
    (dict(K=256, C=8), 'in 8 bits in groups of 64'),
    (dict(S=64, bits=4, paged=True), 'pages of 64 tokens')])
def test_other_attention_is_xlas(how, why):
  run, shapes = attention_call(**how)
  assert 'mosaic_gpu' not in program(run, *shapes)
  with pytest.raises(ValueError, match=f"'pallas': .*{why}.*; here there are: xla"):
    program(lambda *a: run(*a, implementation='pallas'), *shapes)


def test_other_gpus_have_no_kernel():
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh(
      (), (), abstract_device=jax.sharding.AbstractDevice('NVIDIA A100-SXM4-80GB', 1, 'gpu'))):
    assert 'is for an NVIDIA Hopper' in device.why_no_hopper()
  assert 'this program is for cpu' in device.why_no_hopper()


def test_without_a_gpu_no_gpu_kernel_is_imported():
  code = ('import sys, jax.numpy as jnp; from lean_jax.kernels.int8_matmul import api; '
          'api.int8_matmul(jnp.ones((64, 8)), jnp.ones((4, 8), jnp.int8), jnp.ones((1, 4)), '
          "layout='columns'); assert 'jax.experimental.pallas.mosaic_gpu' not in sys.modules")
  subprocess.run([sys.executable, '-c', code], check=True)
