"""What the kernels for NVIDIA Hopper share, the same on every JAX."""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CORES = 132                                # of an H100 (SXM) and an H200


def loaded(ref, at, layout):
  """ref[at] in registers, laid out so; not every thread's part is contiguous."""
  if jax.__version_info__ < (0, 11):
    return plgpu.load(ref, at, layout=layout, optimized=False)
  return plgpu.load(ref.at[at], layout=layout, optimized=False)


def filled(x, *blocks):
  """x with zeros up to whole blocks, one size an axis."""
  more = [-size % block for size, block in zip(x.shape, blocks, strict=True)]
  return jnp.pad(x, [(0, m) for m in more]) if any(more) else x


def costs(flops, bytes_accessed, transcendentals=0):
  """The keyword of `plgpu.kernel` that says what a call takes; JAX 0.10 has none."""
  if jax.__version_info__ < (0, 11):
    return {}
  return dict(cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=bytes_accessed,
                                            transcendentals=transcendentals))
