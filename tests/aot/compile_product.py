"""Compiles a rounded weight's product on four chips of a TPU, ahead of time.

python tests/aot/compile_product.py SCHEME INPUTS OUTPUTS      the logical names of the axes

Prints a line of JSON: whether its kernel is in the program, and the (dtype, shape)s it gathers.
"""
import json
import os
import re
import sys

os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
                  TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lean_jax.quantization.rtn import rtn
from lean_jax.training import mesh
from lean_jax.weights import Dense
from lean_jax.weights.prepared import prepare


def main(scheme, *axes):
  """Of 512 rows and a weight [2048, 4096], on 1 x 2 x 2 chips."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices
  grid = mesh.make_mesh(fsdp=2, tensor=2, devices=chips)
  w = jax.eval_shape(lambda: prepare(
      rtn(Dense(jnp.zeros((2048, 4096), jnp.bfloat16), 'io', axes), scheme), 'tpu'))
  w = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), w,
                   mesh.shardings(w, grid))
  x = jax.ShapeDtypeStruct((4, 128, 2048), jnp.bfloat16, sharding=mesh.batch_sharding(grid))
  with mesh.on(grid):
    text = jax.jit(lambda w, x: w.einsum('btd,df->btf', x)).trace(w, x).lower(
        lowering_platforms=('tpu',)).compile().as_text()
  gathered = re.findall(r'= (\w+)\[([\d,]*)\]\S* all-gather\(', text)
  print(json.dumps(dict(kernel='tpu_custom_call' in text, gathered=gathered)))


if __name__ == '__main__':
  main(*sys.argv[1:])
