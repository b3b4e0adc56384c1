"""Compiles distill_loss and its gradients for a TPU, ahead of time; prints bytes of temporaries."""
import json
import os
import sys

os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
                  TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lean_jax.kernels.distill_loss.api import distill_loss


def main(topology, T, V, D, dtype):
  """[T D] times [D V], for one chip of a topology."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  one = NamedSharding(Mesh(np.array(chips[:1]), ('x',)), PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(s, dtype, sharding=one) for s in ((T, D), (D, V)) * 2]
  out = {}
  forms = dict(plain=dict(implementation='reference'), fused={}, small=dict(chunk=32))
  for name, how in forms.items():
    run = jax.jit(jax.value_and_grad(lambda *a, how=how: distill_loss(*a, **how)[0], (0, 1)))
    done = run.trace(*shapes).lower(lowering_platforms=('tpu',)).compile()
    out[name] = done.memory_analysis().temp_size_in_bytes
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
