"""What the kernels for NVIDIA Hopper share, the same on every JAX."""
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CORES = 132                                # of an H100 (SXM) and an H200
DEPTH = 16                                 # what wgmma sums over at once


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


def tiled(size, bytes_each):
  """How shared memory has rows of so many elements, one below the other."""
  line = min(128, size * bytes_each)
  if line < 32:
    return ()
  return plgpu.TilingTransform((8, line // bytes_each)), plgpu.SwizzleTransform(line)


def multiplied(codes, x, start):
  """codes @ x.T, float32: parts of a matrix in registers, and columns of the block x from `start`.

  Parts that are narrower than what is summed at once are joined first.
  """
  each = max(1, DEPTH // codes[0].shape[1])
  codes = [jnp.concatenate(codes[k:k + each], axis=1) if each > 1 else codes[k]
           for k in range(0, len(codes), each)]
  (N, depth), M = codes[0].shape, x.shape[0]

  def product(sums):
    for k, left in enumerate(codes):
      plgpu.wgmma(sums, plgpu.layout_cast(left, plgpu.Layout.WGMMA),
                  x.at[:, pl.ds(start + k * depth, depth)].T)
    return sums[...]
  return pl.run_scoped(product, plgpu.ACC((N, M), jnp.float32))


def numbers(words, bits, symmetric):
  """The codes of words [N W], int16, as signed bfloat16 times 2**(bits * place), the one in a byte.

  Parts [N W]: the first codes of all words, the second ones, ...
  Seven bits m under the exponent of 0x4300 are 128 + m. The eighth is the lowest bit of the
  exponent: 0x4380 is 256. Codes that count from 0 come out less half their range.
  """
  parts = []
  for byte in (words, lax.shift_right_logical(words, np.int16(8))):
    for place in range(0, 8, bits):
      mask, sign = (2 ** bits - 1) << place, 1 << (place + bits - 1)
      if sign < 128:                                       # 128 + what a code counted from 0 is
        number = _float(byte, mask, 0x4300 ^ (sign if symmetric else 0))
        parts.append(number - jnp.bfloat16(128 + sign))
      else:
        top = _float(byte, sign, 0x4300 ^ (0 if symmetric else sign))            # 128 or 256
        parts.append(_float(byte, mask ^ sign, 0x4300) - top)
  return parts


def _float(words, mask, flipped):
  """The bfloat16 of the masked bits of words, some of them flipped."""
  return lax.bitcast_convert_type((words & np.int16(mask)) ^ np.int16(flipped), jnp.bfloat16)
