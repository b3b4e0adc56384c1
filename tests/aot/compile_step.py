"""Compiles a sharded distillation step for a TPU topology, ahead of time; prints its bytes."""
import json
import os
import sys

os.environ.update(JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_WORKER_HOSTNAMES='localhost',
                  TPU_ACCELERATOR_TYPE='v5litepod-4', ALLOW_MULTIPLE_LIBTPU_LOAD='1')

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from lean_jax import methods, tree
from lean_jax.distillation.losses import distillation
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.training import ahead, mesh
from lean_jax.training.optimizer import adamw

KINDS = {
    'dense': ((), '.*'),
    'qat': ((dict(where='layers/.*', method='fake_quantize', spec='w4a16-g64'),), '.*'),
    'qlora': ((dict(where='layers/.*', method='rtn', spec='w4a16-g64'),
               dict(where='layers/.*', method='lora', rank=8, alpha=16)), '.*/(a|b)'),
}


def main(topology, kind):
  """Compiles for 1 x 2 x 2 chips of a topology."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  grid = mesh.make_mesh(fsdp=2, tensor=2, devices=chips)
  teacher = DecoderConfig(vocabulary=1024, width=256, layers=4, heads=4, groups=2, head_width=64,
                          hidden=512, context=256, dtype='bfloat16', remat=True)
  student = DecoderConfig(**{**vars(teacher), 'layers': 2})
  steps, trainable = KINDS[kind]

  def initial(config, steps):
    params = Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))['params']
    return methods.apply(params, steps, jax.random.key(1))

  params = jax.eval_shape(lambda: initial(student, steps))
  known = jax.eval_shape(lambda: initial(teacher, ()))
  loss = distillation(Decoder(student), Decoder(teacher), temperature=2., soft_weight=.5)
  step, (state, rest, frozen, *_) = ahead.traced(
      loss, params, adamw(steps=10, peak=1e-3), dict(tokens=((16, 256), jnp.int32)), grid,
      trainable=trainable, frozen=dict(teacher_params=known))
  with mesh.on(grid):
    done = step.lower(lowering_platforms=('tpu',)).compile()
  memory = done.memory_analysis()
  whole = tree.nbytes((state.train, state.opt, rest, frozen))
  print(json.dumps(dict(topology=topology, kind=kind, chip=memory.argument_size_in_bytes,
                        temporaries=memory.temp_size_in_bytes, whole=whole)))


if __name__ == '__main__':
  main(*sys.argv[1:])
