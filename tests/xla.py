"""What XLA is asked for where programs are compiled once and run once, which is most of a test.

Less optimization, one part of a program after the other, since tests have a process for each core,
and of JAX 0.10 the older code generation, which takes half as long.
"""
import importlib.metadata
import os

QUICK = '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
NEWER = {}                    # of jax.jit's compiler_options: the other code generation
if importlib.metadata.version('jaxlib').startswith('0.10.'):           # later ones have no older
  QUICK += ' --xla_cpu_use_fusion_emitters=false'
  NEWER = dict(xla_cpu_use_fusion_emitters=True)


def quick(devices=8):
  """Asks it for this process, and for so many virtual CPU devices; before JAX is used."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ['XLA_FLAGS'] = ' '.join([
      os.environ.get('XLA_FLAGS', ''), f'--xla_force_host_platform_device_count={devices}', QUICK])
