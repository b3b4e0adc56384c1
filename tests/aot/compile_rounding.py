"""Compiles roundings of a [4096 4096] array for one chip of a TPU, ahead of time.

python tests/aot/compile_rounding.py TOPOLOGY

Prints a line of JSON: for each of them the bytes of temporaries, and how many bytes its program
reads and writes over those of the array.
"""
import functools
import json
import os
import sys

os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
                  TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lean_jax.kernels.fake_quant.api import fake_quant, learned_step
from lean_jax.kernels.quantize_rows.api import quantize_rows
from lean_jax.quantization.spec import parse_spec

SIZE = 4096


def learned(name):
  """The gradients of `learned_step`, and the shapes that they are of."""
  spec = parse_spec(name)
  steps = [(-(-SIZE // (spec.group or SIZE)), SIZE)] * (1 if spec.symmetric else 2)

  def run(v, g, *steps):
    of = lambda v, step, offset=None: learned_step(v, step, offset, spec)
    return jax.vjp(of, v, *steps)[1](g)
  return run, [(SIZE, SIZE)] * 2 + steps


def main(topology):
  """Of float32 weights, and of bfloat16 activations."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  mesh = Mesh(np.array(chips[:1]), ('x',))
  one = NamedSharding(mesh, PartitionSpec())
  cases = {f'gradients {name}': (*learned(name), jnp.float32)
           for name in ('w4a16-g64', 'w2a16-g64', 'w4a16')}
  for name in ('w4a16-g64', 'w1.58a16'):
    run = functools.partial(fake_quant, spec=parse_spec(name))
    cases[f'forward {name}'] = run, [(SIZE, SIZE)], jnp.float32
  for bits in (8, 4):
    for way, how in (('plain', {}), ('norm and block', dict(norm=jnp.ones(SIZE), epsilon=1e-6,
                                                            block=128))):
      cases[f'rows of {bits} bits, {way}'] = (
          lambda x, bits=bits, how=how: quantize_rows(x, bits=bits, implementation='pallas', **how),
          [(SIZE, SIZE)], jnp.bfloat16)
  out = {}
  with jax.sharding.set_mesh(mesh):
    for name, (run, shapes, dtype) in cases.items():
      shapes = [jax.ShapeDtypeStruct(s, dtype, sharding=one) for s in shapes]
      done = jax.jit(run).trace(*shapes).lower(lowering_platforms=('tpu',)).compile()
      array = SIZE ** 2 * jnp.dtype(dtype).itemsize
      out[name] = dict(temporaries=done.memory_analysis().temp_size_in_bytes,
                       moved=done.cost_analysis()['bytes accessed'] / array)
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1])
