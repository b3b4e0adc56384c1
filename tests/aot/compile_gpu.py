"""Compiles an op for an H200 on this machine's CPU, as the op chooses its form, and says into what.

python tests/aot/compile_gpu.py SCHEME M N K [EXPERTS]
python tests/aot/compile_gpu.py cache|pages BITS ROWS HEADS TOKENS CHANNELS GRIDS GROUP

SCHEME is 'w8a8', an int8_matmul with bias and activation, or that of a weight_only_matmul; `cache`
is an attention_decode of the second of three layers, `pages` of pages of 256 tokens. Prints a line
of JSON: the wgmma instructions in the PTX, bytes spilled and registers by ptxas, and the bytes
of temporaries in the device's memory.
"""
import functools
import json
import os
import pathlib
import re
import sys
import tempfile

os.environ.update(JAX_PLATFORMS='cpu', CUDA_VISIBLE_DEVICES='-1', MOSAIC_GPU_DUMP_PTX='1')
FOLDER = tempfile.mkdtemp()
os.environ.update(MOSAIC_GPU_DUMP_TO=FOLDER, MOSAIC_GPU_DUMP_PTXAS='1')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lean_jax.topology import devices  # noqa: E402


def compiled(f, *args):
  """f of ShapeDtypeStructs, compiled for one H200."""
  chips, _ = devices('h200')
  mesh = jax.sharding.Mesh(np.array(chips), ('x',))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), args)
  with jax.sharding.set_mesh(mesh):
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=('cuda',)).compile()


def call(scheme, M, N, K, batch):
  """(the function, its ShapeDtypeStructs) of a call of an op with weights in layout 'columns'."""
  from lean_jax.kernels.int8_matmul import api as int8
  from lean_jax.kernels.weight_only_matmul import api as weight_only
  from lean_jax.quantization import layouts
  from lean_jax.quantization.spec import parse_spec
  of, spec = lambda shape, dtype: jax.ShapeDtypeStruct((*batch, *shape), dtype), parse_spec(scheme)
  x = of((M, K), jnp.bfloat16)
  if spec.activation_bits:
    run = lambda x, v, s, b: int8.int8_matmul(x, v, s, bias=b, activation='silu', layout='columns',
                                              dtype=jnp.bfloat16)
    return run, (x, of((N, K), jnp.int8), of((1, N), jnp.float32), of((1, N), jnp.float32))
  scale = (K // spec.group if spec.group else 1, N)
  stored = jnp.int8 if spec.bits == 8 and spec.symmetric else jnp.uint8
  shapes = [x, of(layouts.shape((), K, N, spec, 'columns'), stored), of(scale, jnp.bfloat16)]
  if not spec.symmetric:
    shapes.append(of(scale, jnp.uint8))
  return (lambda x, v, s, z=None: weight_only.weight_only_matmul(x, v, s, z, spec,
                                                                 layout='columns')), shapes


def attention(form, bits, N, R, S, K, C, g):
  """(the function, its ShapeDtypeStructs) of attention_decode, C grids a token's values."""
  from lean_jax.kernels.attention_decode import api
  of = jax.ShapeDtypeStruct
  lead, n = ((3, N), S) if form == 'cache' else ((N * S // 256,), 256)
  grid = lambda *shape: (of((*lead, *shape), jnp.float16),) * 2
  codes = of((*lead, n * bits // 8, K), jnp.uint8)
  args = of((N, R, K), jnp.bfloat16), api.Codes(codes, *grid(n // g, K)), api.Codes(
      codes, *grid(n, C))
  if form == 'cache':
    near = of((N, g, K), jnp.bfloat16)
    return (lambda q, k, v, visible, at, *recent: api.attention_decode(
        q, k, v, visible, bits=bits, length=at, layer=1, recent=recent, softcap=30.)), (
            *args, of((1, S), bool), of((), jnp.int32), near, near)
  return functools.partial(api.attention_decode_paged, bits=bits), (
      *args, of((N, S // 256), jnp.int32), of((N,), jnp.int32))


def main(scheme, *sizes):
  sizes = tuple(map(int, sizes))
  if scheme in ('cache', 'pages'):
    run, shapes = attention(scheme, *sizes)
  else:
    run, shapes = call(scheme, *sizes[:3], sizes[3:])
  done = compiled(run, *shapes)
  files = {f.name: f.read_text(errors='replace') for f in pathlib.Path(FOLDER).rglob('*')
           if f.is_file()}
  ptx = '\n'.join(text for text in files.values() if '.target sm_90' in text)
  log = '\n'.join(text for name, text in files.items() if 'ptxas' in name)
  found = lambda pattern: [int(n) for n in re.findall(pattern, log)]
  print(json.dumps(dict(
      wgmma=sorted(set(re.findall(r'wgmma\.mma_async\S*', ptx))),
      spilled=found(r'(\d+) bytes spill'), registers=found(r'Used (\d+) registers'),
      temporaries=done.memory_analysis().temp_size_in_bytes)))


if __name__ == '__main__':
  main(*sys.argv[1:])
