"""Compiles attention_decode's kernel for a TPU, ahead of time; prints bytes of temporaries."""
import json
import os
import sys

os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
                  TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lean_jax.kernels.attention_decode.api import (
  Codes,
  attention_decode,
  attention_decode_paged,
)

L, N, R, S, K, C, G, PAGE = 2, 8, 4, 8192, 128, 4, 32, 256


def main(topology, bits, form):
  """A layer of two, 8 rows of 8192 tokens; `form` is 'cache' or 'pages'."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  one = NamedSharding(Mesh(np.array(chips[:1]), ('x',)), PartitionSpec())
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=one)

  def codes(*lead, tokens):
    values = of('uint8', *lead, tokens * bits // 8, K)
    return (Codes(values, *(of('float16', *lead, tokens // G, K) for _ in range(2))),
            Codes(values, *(of('float16', *lead, tokens, C) for _ in range(2))))
  q = of('bfloat16', N, R, K)
  if form == 'cache':
    def run(q, k, v, visible, length, layer, *recent):
      return attention_decode(q, k, v, visible, bits=bits, length=length, layer=layer,
                              recent=recent)
    near = of('bfloat16', N, G, K)
    args = (q, *codes(L, N, tokens=S), of('bool', N // 2, S), of('int32'), of('int32'), near, near)
  else:
    def run(q, k, v, table, lengths):
      return attention_decode_paged(q, k, v, table, lengths, bits=bits)
    M = S // PAGE
    args = (q, *codes(N * M, tokens=PAGE), of('int32', N, M), of('int32', N))
  done = jax.jit(run).trace(*args).lower(lowering_platforms=('tpu',)).compile()
  print(json.dumps(dict(temporaries=done.memory_analysis().temp_size_in_bytes,
                        kernel='attention_decode' in done.as_text())))


if __name__ == '__main__':
  main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
