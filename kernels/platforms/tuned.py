"""The tiles of the TPU kernels: found by `lean-jax tune`, or by rule where nobody looked.

`tuned/KIND.json` has {case: {'blocks': [rows, columns, depth], 'cycles': ..., 'share': ...}}, the
case as `case` writes it. What the rule says is what was found over several shapes by the static
schedule: a tile that has all of K needs no sums in memory. Tiles of 512 x 512 of a product of int8
matrices of 4096 then reach 93% of the peak instead of 76% on a v5e, 81% instead of 53% on a v6e.
"""
import functools
import json
import math
import pathlib

import jax.numpy as jnp

from lean_jax.kernels.platforms import device

FOLDER = pathlib.Path(__file__).parent / 'tuned'
LANES, ROWS = 128, 32                 # of a register of 8 bits; the other types' divide them
_VMEM = 64 * 2 ** 20                  # bytes, where no device is known (in an interpreter)


def case(op, dtype, M, K, N, group, experts=None):
  """The name of a case; M counts by its next power of two, from 16 on.

  Tiles of experts are (rows, columns), with all of K.
  """
  bucket = max(16, 2 ** math.ceil(math.log2(M)))
  return (f'{op} {jnp.dtype(dtype).name} m{bucket} k{K} n{N} g{group or 0}'
          + (f' e{experts}' if experts else ''))


def blocks(op, dtype, M, K, N, group):
  """(rows, columns, depth) of a tile, for the device that a program is traced for."""
  return found(op, dtype, M, K, N, group) or by_rule(M, K, N)


def found(*of):
  """The tile that was found of a case, as `case` takes it, for that device; None without."""
  entry = entries(device.kind()).get(case(*of))
  return entry and tuple(entry['blocks'])


def by_rule(M, K, N):
  """A tile that has all of K, and a few MB of the weight, as far as VMEM goes."""
  depth = -(-K // -(-K // 16384))
  columns = 512 if M <= 128 or K <= 8192 else 256
  return (1024 if depth <= 8192 else 512), min(columns, N), depth


@functools.lru_cache
def entries(kind):
  """{case: found} of a kind of device; none where nothing was tuned."""
  file = FOLDER / f'{kind.replace(" ", "_")}.json'
  return json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}


def fitted(tile, M, K, N, group):
  """A tile that the device takes: no larger than the operands, a whole number of groups deep.

  Rows and columns are all of them, or a multiple of what a register has.
  """
  bm, bn, bk = tile
  unit = math.lcm(group or LANES, LANES)
  up = lambda n, to: -(-n // to)
  bm = M if bm >= M else up(bm, ROWS) * ROWS
  bn = N if bn >= N else up(bn, LANES) * LANES
  return min(bm, M), min(bn, N), min(up(bk, unit), up(K, unit)) * unit


def of_tiles(scale, E, steps, each):
  """[*E G N] as [E steps each N]: the scales of each tile's groups; those beyond K are zeros."""
  *_, G, N = scale.shape
  scale = jnp.pad(scale.reshape(E, G, N), [(0, 0), (0, steps * each - G), (0, 0)])
  return scale.reshape(E, steps, each, N)


def vmem_limit():
  """Bytes of VMEM that a kernel may take: half of it, the other half is the compiler's."""
  info = device.tpu()
  return _VMEM if info is None else info.vmem_capacity_bytes // 2
