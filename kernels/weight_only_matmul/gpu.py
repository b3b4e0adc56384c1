"""weight_only_matmul on NVIDIA Hopper: codes become bfloat16 in registers, a side of wgmma.

The product is that of the weight with x transposed: registers are wgmma's left side only. A block
of 64 or 128 output channels is one warpgroup's; its words of 16 bits come by TMA, several steps of
K ahead. With few rows the weight is what takes time, so K is split too, until the whole device
reads.

A word has several codes. Each is masked where it is, and its bits are those of a bfloat16 from
which a constant is taken off (`hopper.numbers`); what it is too large by, a power of two, the
column of x that meets it is smaller by. So the codes of a word meet columns of x in another order,
in which x is laid out before. All of it is exact but the sums, in float32.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.platforms import hopper
from lean_jax.kernels.platforms.hopper import CORES, costs, filled, loaded
from lean_jax.quantization import layouts

ROWS = 64                                  # of x, in a block
_LINE = 32                                 # float32 numbers that JAX 0.10 copies, at least
# Rows from which a bfloat16 weight, written out and read once, costs less than what blocks of 64
# rows take from the cache and convert again; by the bytes and instructions, not by a clock.
MOST = 512
_SHARED = 76 * 2 ** 10                     # bytes of a block, so that a core has three at work
_STAGES = 4                                # steps of K in shared memory, if they fit; or two


def weight_only_matmul(x, values, scale, zero, spec, *, split=None):
  """See api.weight_only_matmul.

  Args:
    x: [*E M K], bfloat16.
    values: [*E N K*bits/8], layout 'columns'; N a multiple of 64.
    scale: [*E G N] or [*E G 1], float32 or bfloat16.
    zero: as scale, or None.
    spec: QuantSpec of integers of 2, 4 or 8 bits; see `part`.
    split: parts of K that are summed apart, or None: as many as the device is busy with.
  """
  one = lambda x, values, scale, zero: _product(x, values, scale, zero, spec, split)
  for _ in x.shape[:-2]:
    one = jax.vmap(one)
  return one(x, values, scale, zero)


def part(spec, K):
  """The rows of the weight that are multiplied at once: a group, or some of a large one's.

  None if it is of another size than registers and shared memory are laid out for; on JAX 0.10,
  whose kernels join no arrays, groups of 16 bytes are.
  """
  least = 128 if jax.__version_info__ >= (0, 11) else 256                               # bits
  group = spec.group or K
  size = next((n for n in (128, 64, 32, 16) if group % n == 0), 0)
  whole = size == group or size == 128
  return size if whole and K % group == 0 and size * int(spec.bits) >= least else None


def _product(x, values, scale, zero, spec, split):
  (M, K), N, bits = x.shape, values.shape[0], int(spec.bits)
  group, each = part(spec, K), 16 // bits
  G = K // group
  bm = min(ROWS, max(8, 2 ** math.ceil(math.log2(M))))
  x = jnp.pad(x, [(0, -M % bm), (0, 0)])
  codes = x.reshape(-1, G, group // each, each)                          # [M G words, of a word]
  less = 2. ** (-bits * (np.arange(each).reshape(1, 1, 1, each) % (8 // bits)))
  moved = jnp.swapaxes(codes * jnp.asarray(less, x.dtype), 2, 3).reshape(x.shape)
  words = lax.bitcast_convert_type(values.reshape(N, -1, 2), jnp.int16)
  wide = lambda a: jnp.repeat(jnp.broadcast_to(a, (len(a), N)), G // len(a), axis=0)
  of_zero = () if zero is None else (
      wide((zero.astype(jnp.float32) - layouts.offset(spec)).astype(jnp.bfloat16)),
      filled(jnp.sum(codes, axis=(2, 3), dtype=jnp.float32).T, 1, _LINE))              # [G M]
  y = _blocks(bits, spec.symmetric, group, bm, split, moved, words, wide(scale), *of_zero)
  return jnp.sum(y, axis=0).T[:M].astype(x.dtype)


def _blocks(bits, symmetric, group, bm, split, x, words, scale, *of_zero):
  """[parts of K, N, M], float32, of whole blocks."""
  (M, K), N, G = x.shape, words.shape[0], scale.shape[0]
  width = words.shape[1] // G                              # words of a group
  bn = 128 if N % 128 == 0 else 64
  each = math.gcd(G, max(1, (64 if bm <= 16 else 32) // width))           # groups of a step
  # What is read again to be added is to be little: four small blocks a core, or a large one.
  split = split or _split(G // each, N // bn * (M // bm), (4 if bm <= 16 else 1) * CORES)
  steps = G // each // split
  stages = (_SHARED - 4 * bn * bm) // (2 * each * (bm * group + bn * width))

  def kernel(x, words, scale, *refs):
    *of_zero, y, block = refs
    s, m, n = (lax.axis_index(name) for name in 'smn')

    def step(_, x, words, scale, *rest):
      *of_zero, total = rest
      stored = loaded(words, (slice(None), slice(None)), plgpu.Layout.WGMMA)
      for g in range(each):
        codes = hopper.numbers(stored[:, g * width:(g + 1) * width], bits, symmetric)
        sums = hopper.multiplied(codes, x, g * group)
        if of_zero:
          zero, all_x = of_zero
          sums -= _along(zero, g, 1, sums.shape) * _along(all_x, g, 0, sums.shape)
        total += sums * _along(scale, g, 1, sums.shape)
      return total

    along = lambda size, at: plgpu.BlockSpec((each, size), lambda k: (s * steps + k, at))
    across = lambda rows, at, size, tile: plgpu.BlockSpec(
        (rows, each * size), lambda k: (at, s * steps + k), transforms=hopper.tiled(tile, 2))
    specs = [across(bm, m, group, max(width, hopper.DEPTH)), across(bn, n, width, each * width),
             along(bn, n)]
    zeros = plgpu.layout_cast(jnp.zeros((bn, bm), jnp.float32), plgpu.Layout.WGMMA)
    if of_zero:
      specs += [along(bn, n), along(max(bm, _LINE), m)]
    block[...] = plgpu.emit_pipeline(
        step, grid=(steps,), in_specs=specs,
        max_concurrent_steps=min(_STAGES, max(2, stages), steps), init_carry=zeros)(
            x, words, scale, *of_zero)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, y.at[s, pl.ds(n * bn, bn), pl.ds(m * bm, bm)])
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((split, N, M), jnp.float32),
      grid=(split, M // bm, N // bn), grid_names=('s', 'm', 'n'),
      scratch_types=[plgpu.SMEM((bn, bm), jnp.float32, transforms=hopper.tiled(bm, 4))],
      **costs(2 * M * N * K, 2 * words.size + 2 * x.size + 4 * split * M * N))(
          x, words, scale, *of_zero)


def _split(steps, blocks, most):
  """The parts of K, of two steps at least, that make no more blocks than `most`."""
  return max(n for n in range(1, steps + 1)
             if n == 1 or (steps % n == 0 and n * blocks <= most and steps // n >= 2))


def _along(ref, g, axis, shape):
  """ref[g], of an axis of the sums [N M], as all of them."""
  line = loaded(ref, (g, pl.ds(0, shape[1 - axis])), plgpu.Layout.WGMMA.reduce(axis))
  return lax.broadcast_in_dim(line.astype(jnp.float32), shape, (1 - axis,))
