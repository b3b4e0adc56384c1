"""attention_decode on NVIDIA Hopper: codes become bfloat16 in registers, the left side of wgmma.

A block has a row's queries and some of its tokens, which come by TMA, a tile ahead; what blocks
find is put together after (flash-decoding). Two tokens that follow each other, `even` and `odd`,
are a tile's row: in two halves of its words of 16 bits, or, of 4 bits, in each byte's nibbles. A
word has two channels. A softmax has no order and a sum neither, so tokens and channels stay apart
as masks find them (`hopper.numbers`), and queries are laid out so before.

Scores are keys [tokens, channels] times queries; values are read transposed, [channels, tokens],
times probabilities. Grids are never multiplied with codes: q (code scale + least) is (q scale) code
+ q least, so each group of tokens has queries of its own, side by side in one product, of which a
token takes its group's; and each grid of values has probabilities of its own.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.attention_decode.softmax import Part
from lean_jax.kernels.platforms import hopper

TILE = 128                                 # tokens of a step
HEADS = 8                                  # of a row, that a block has: registers
_ROWS = 64                                 # of a tile, of two tokens each; and of wgmma's left side
_LEAST = float(np.finfo(np.float32).min)
_WIDE, _TURNED = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED


def part(how, q, k, v, pages, lengths, visible, *, split=None):
  """The Part of tokens in codes, in float32.

  Args:
    how: a Scores.
    q: [N R K], bfloat16; K 128 or 256: more channels are more registers than there are.
    k, v: Codes; their values [P n*bits/8 K], pages of n tokens, whole tiles; grids [P n/g K] of
      keys, g 32, 64 or a multiple of TILE, and [P n C] of values, C 1, 4 or K/32.
    pages: [N M], int32, where in k and v each page of a row is.
    lengths: [N], int32, how many tokens of a row are read at all.
    visible: [B M*n] bool, N a multiple of B.
    split: parts of the tokens that are read apart, or None: as many as the device is busy with.
  """
  (N, R, K), M = q.shape, pages.shape[1]
  (P, n, C), groups = v.scale.shape, k.scale.shape[1]
  W, H, tiles = K // 2, -(-R // HEADS), n // TILE
  split = split or max(1, min(M * tiles, 2 * hopper.CORES // (N * H)))
  q = jnp.pad(q.astype(jnp.float32), ((0, 0), (0, H * HEADS - R), (0, 0)))
  q = q.reshape(N, H, HEADS, W, 2).transpose(0, 1, 4, 3, 2)                      # [N H 2 W heads]
  words = lambda x: lax.bitcast_convert_type(x.reshape(P * n // 2, -1, 2), jnp.int16)
  pairs = lambda x: lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), jnp.int32)
  by_channel = lambda x: pairs(x.reshape(P * groups, K))
  by_token = lambda x: pairs(x.reshape(-1)) if C == 1 else x.reshape(P * n // 2, 2 * C)
  seen = visible.reshape(-1, 2).astype(jnp.int32)
  seen = seen[:, 0] + 2 * seen[:, 1]
  found = _blocks(how, n // groups, C, len(visible), split, tiles, q, pages, lengths,
                  words(k.values), words(v.values), by_channel(k.scale), by_channel(k.least),
                  by_token(v.scale), by_token(v.least), seen)           # [split N H K+64 heads]
  by_head = lambda x: jnp.moveaxis(x, -1, 3).reshape(split, N, H * HEADS, *x.shape[3:-1])[:, :, :R]
  own = by_head(found[..., K:K + 2 + C, :])
  total, top, least = own[..., :1], own[..., 1:2], own[..., 2:, None]
  mixed = found[..., :K, :].reshape(split, N, H, 2, C, W // C, HEADS)
  mixed = by_head(jnp.moveaxis(mixed, 3, 5)).reshape(split, N, R, C, K // C) + least
  best = jnp.max(top, axis=0, keepdims=True)
  fade = jnp.exp(top - best)
  return Part(jnp.sum(mixed.reshape(split, N, R, K) * fade, axis=0), best[0],
              jnp.sum(total * fade, axis=0))


def _blocks(how, g, C, B, split, tiles, q, pages, lengths, *codes):
  """[split N H K+64 heads], float32: rows of channels, the even ones first, without least numbers;
  then the sums of probabilities, the greatest scores, and C sums of probabilities times least."""
  N, H, _, W, heads = q.shape
  M, groups, width = pages.shape[1], max(1, TILE // g), codes[0].shape[1]
  laid = hopper.tiled(2 * W, 2)

  def kernel(q, pages, lengths, *refs):
    *codes, y, queries, probs, block = refs
    s, row, h = (lax.axis_index(name) for name in ('s', 'row', 'heads'))
    most = jnp.minimum((lengths[row] + TILE - 1) // TILE, M * tiles)
    each = (most + split - 1) // split
    first = s * each
    steps = jnp.clip(most - first, 0, each)
    query = [hopper.loaded(q, (row, h, half), _WIDE) for half in range(2)]

    def at(t):
      t = first + t
      return pages[row, t // tiles] * tiles + t % tiles
    rows = lambda size, count=_ROWS, transforms=(), of=at: plgpu.BlockSpec(
        (count, size), lambda t: (of(t), 0), transforms=transforms)
    line = lambda of: plgpu.BlockSpec((_ROWS,), lambda t: (of(t),))
    code = rows(width, transforms=hopper.tiled(width, 2))
    by_channel = rows(W, groups, of=lambda t: at(t) * TILE // (g * groups))
    by_token = line(at) if C == 1 else rows(2 * C)
    visible = line(lambda t: lax.rem(row, B) * M * tiles + first + t)
    step = functools.partial(_step, how, g, C, query, queries, probs,
                             lambda t: lengths[row] - (first + t) * TILE)
    nothing = plgpu.layout_cast(jnp.zeros((_ROWS, heads), jnp.float32), _WIDE)
    top = plgpu.layout_cast(jnp.full((heads,), _LEAST, jnp.float32), _WIDE.reduce(0))
    count = 2 * W // _ROWS
    top, total, *found = plgpu.emit_pipeline(
        step, grid=(steps,), in_specs=[code, code, by_channel, by_channel, by_token, by_token,
                                       visible],
        max_concurrent_steps=2, init_carry=(top, *(nothing for _ in range(1 + count + C))))(*codes)
    for k, x in enumerate(found[:count]):
      block[pl.ds(k * _ROWS, _ROWS)] = x
    own, line = nothing, _rows(heads)
    for k, x in enumerate((jnp.sum(total, axis=0), top, *(
        jnp.sum(x, axis=0) for x in found[count:]))):
      own = jnp.where(line == k, _wide(x, own.shape, 1), own)
    block[pl.ds(2 * W, _ROWS)] = own
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, y.at[s, row, h])
    plgpu.wait_smem_to_gmem(0)

  shape = (2 * W + _ROWS, heads)
  tokens = N * M * tiles * TILE
  return plgpu.kernel(
      kernel, out_type=jax.ShapeDtypeStruct((split, N, H, *shape), jnp.float32),
      grid=(split, N, H), grid_names=('s', 'row', 'heads'),
      scratch_types=[plgpu.SMEM((groups * heads, 2 * W), jnp.bfloat16, transforms=laid),
                     plgpu.SMEM((C * heads, TILE), jnp.bfloat16, transforms=hopper.tiled(TILE, 2)),
                     plgpu.SMEM(shape, jnp.float32, transforms=hopper.tiled(heads, 4))],
      **hopper.costs(8 * tokens * H * heads * W, sum(x.nbytes for x in codes), tokens * H * heads))(
          q, pages, lengths, *codes)


def _step(how, g, C, query, queries, probs, left, at, k, v, k_scale, k_least, v_scale, v_least,
          seen, carry):
  """A tile's tokens, of which `left` of its number or more are of the row."""
  top, total, *found = carry
  W, heads, size, middle = queries.shape[1] // 2, total.shape[1], g // 2, 2. ** (how.bits - 1)
  mixed, least = found[:-C], found[-C:]
  less = [2. ** (-how.bits * e) if how.bits < 8 else 1. for e in range(2)]
  begins = []
  for i in range(queries.shape[0] // heads):
    begin, own = 0, pl.ds(i * heads, heads)
    scales, lows = (_halves(hopper.loaded(x, (i, slice(None)), _WIDE.reduce(1)))
                    for x in (k_scale, k_least))
    for half, (x, scale, low) in enumerate(zip(query, scales, lows)):
      scaled = x * _wide(scale, x.shape, 0)
      begin += x * _wide(low, x.shape, 0) + middle * scaled
      _put(queries.at[own, pl.ds(half * W, W)], scaled)
    begins.append(_wide(jnp.sum(begin, axis=0), (_ROWS, heads), 1))
  plgpu.commit_smem()

  line, scores, visible = _rows(heads), [], []
  bits = hopper.loaded(seen, (slice(None),), _WIDE.reduce(1))
  for e in range(2):
    products = hopper.multiplied(_codes(k, how.bits, e, 0, W), queries, 0)
    score = begins[0] + less[e] * products[:, :heads]
    for i in range(1, len(begins)):
      other = begins[i] + less[e] * products[:, i * heads:(i + 1) * heads]
      score = jnp.where(line >= i * size, other, score)
    see = (_wide(bits, line.shape, 0) & (e + 1)) != 0
    visible.append(see & (2 * line + e < left(at[0])))
    scores.append(jnp.where(visible[e], how.of(score), _LEAST))

  best = jnp.maximum(top, jnp.max(jnp.maximum(*scores), axis=0))
  fade = jnp.exp(top - best)
  total = total * _wide(fade, total.shape, 1)
  least = [x * _wide(fade, x.shape, 1) for x in least]
  for e, score in enumerate(scores):
    p = jnp.where(visible[e], jnp.exp(score - _wide(best, score.shape, 1)), 0.)
    total += p
    for c in range(C):
      scale, low = (_wide(_of_token(x, C, e, c), p.shape, 0) for x in (v_scale, v_least))
      scaled = jnp.where(visible[e], p * scale, 0.)        # past the end there may be any number
      least[c] += jnp.where(visible[e], p * low, 0.) + middle * scaled
      _put(probs.at[pl.ds(c * heads, heads), pl.ds(e * _ROWS, _ROWS)], less[e] * scaled)
  plgpu.commit_smem()

  few = max(1, C * _ROWS // W)                             # grids that 64 words' channels have
  for first in range(0, W, _ROWS):
    tokens = [_codes(v, how.bits, e, first, _ROWS, turned=True) for e in range(2)]
    for half, codes in enumerate(zip(*tokens)):
      products = hopper.multiplied(
          list(codes), probs.at[pl.ds(first * C // W * heads, few * heads)], 0)
      own = products[:, :heads]
      for c in range(1, few):
        own = jnp.where(line >= c * (W // C), products[:, c * heads:(c + 1) * heads], own)
      at = (half * W + first) // _ROWS
      mixed[at] = mixed[at] * _wide(fade, own.shape, 1) + own
  return (best, total, *mixed, *least)


def _codes(ref, bits, e, first, count, turned=False):
  """Codes of a tile's even or odd tokens, of the even channels, and of the odd ones: of `count`
  words of a token from its `first` on; [tokens words], or turned."""
  if bits == 8:
    first += e * ref.shape[1] // 2
  ref, every = ref.at[:, pl.ds(first, count)], (slice(None), slice(None))
  words = plgpu.layout_cast(hopper.loaded(ref.T, every, _TURNED), _WIDE) if turned else (
      hopper.loaded(ref, every, _WIDE))
  return hopper.numbers(words, bits, False)[e % (8 // bits)::8 // bits]


def _put(ref, x):
  """x [W heads] in bfloat16 to ref [heads W]."""
  ref.T[...] = plgpu.layout_cast(x.astype(jnp.bfloat16), _TURNED)


def _of_token(ref, C, e, c):
  """The number of grid c of a tile's even or odd tokens, float32 [rows]."""
  if C == 1:
    return _halves(hopper.loaded(ref, (slice(None),), _WIDE.reduce(1)))[e]
  at = e * C + c
  few = pl.ds(at // 8 * 8, 8)
  x = hopper.loaded(ref, (slice(None), few), _WIDE).astype(jnp.float32)          # [rows 8]
  column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=_WIDE)
  return jnp.sum(jnp.where(column == at % 8, x, 0.), axis=1)


def _halves(words):
  """The float32 of each two float16 in a word of 32 bits."""
  of = lambda x: lax.bitcast_convert_type(x.astype(jnp.int16), jnp.float16).astype(jnp.float32)
  return of(words), of(words >> 16)


def _wide(x, shape, axis):
  return lax.broadcast_in_dim(x, shape, (axis,))


def _rows(columns):
  return plgpu.broadcasted_iota(jnp.int32, (_ROWS, columns), 0, layout=_WIDE)
