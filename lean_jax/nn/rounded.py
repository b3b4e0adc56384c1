"""Keys and values in few bits: what attention keeps of a text, and how queries read it.

Liu et al. 2024 (KIVI, arXiv:2402.02750), section 3: some channels of keys are far from the others
in all tokens, so keys share a grid along the tokens, channel by channel; values share one along a
token's channels. Tokens of a group that is not full yet stay floats.

A query reads the group of its own place in floats and the groups before it in codes, whatever the
calls in which its tokens came: decoding is one pass over the whole text, also where drafts are
taken back. (KIVI reads a prompt in floats while it is being read.)
"""
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.kernels.attention_decode import api as attention_decode
from lean_jax.kernels.attention_decode.codes import apart, joined
from lean_jax.quantization.codes import with_nan
from lean_jax.quantization.packing import pack

CHANNELS = 32                 # of a value that share a grid, at most
_CHUNK = 256                  # tokens whose codes are read at a time; never are all floats at once
_TOP = 65504.                 # the greatest float16


@dataclasses.dataclass(frozen=True)
class Rounding:
  """How keys and values are kept.

  Attributes:
    bits: of a number, 8 or 4.
    group: g, consecutive tokens whose keys share a grid.
    kept: groups of the latest tokens that stay as floats: 1; 2 where up to g + 1 tokens at a time
      may be taken back.
  """
  bits: int
  group: int = 32
  kept: int = 1


class Held(NamedTuple):
  """What the queries of a call attend to.

  Attributes:
    slot: with the codes of all tokens so far, those of this call too.
    k, v: [G*B n*g K], the floats of the n groups that this call has tokens in.
    first: the number of the first of these groups; last: of the last query's.
    own: [T n*g] bool, which of these places are in a query's own group; None where all are.
    config: of the stack.
  """
  slot: Any
  k: Any
  v: Any
  first: Any
  last: Any
  own: Any
  config: Any

  def scores(self, q):
    """Products of queries [G*B R*T K] with all keys, [G*B R*T S] float32, S a multiple of g."""
    product = lambda k: jax.lax.dot_general(q, k, (((2,), (2,)), ((0,), (0,))),
                                            preferred_element_type=jnp.float32)
    n, near = self._size, product(self.k)
    out = jnp.zeros((*q.shape[:2], self._room + near.shape[2]), jnp.float32)
    write = lambda part, at, out: jax.lax.dynamic_update_slice_in_dim(out, part, at, axis=2)
    # Tokens in one byte are apart, so that no array of floats is put together from theirs.
    of = lambda i: jnp.stack([product(k) for k in self._decoded('k', i)], axis=-1)
    out = jax.lax.fori_loop(
        0, self._chunks, lambda i, out: write(of(i).reshape(*q.shape[:2], n), i * n, out), out)
    if self.own is not None:
      far = jax.lax.dynamic_slice_in_dim(out, self._at, near.shape[2], axis=2)
      near = jnp.where(self._own(q.shape[1]), near, far)
    return write(near, self._at, out)[:, :, :self._room]

  def mixed(self, probs):
    """Values weighted by probs [G*B R*T S]: [G*B R*T K], in the dtype of probs."""
    product = lambda p, v: jax.lax.dot_general(p, v, (((2,), (1,)), ((0,), (0,))),
                                               preferred_element_type=jnp.float32)
    n, width = self._size, self.v.shape[1]
    far = jnp.pad(probs, ((0, 0), (0, 0), (0, self._room + width - probs.shape[2])))
    near = jax.lax.dynamic_slice_in_dim(far, self._at, width, axis=2)
    rest = jnp.zeros_like(near)
    if self.own is not None:
      own = self._own(probs.shape[1])
      near, rest = jnp.where(own, near, 0), jnp.where(own, 0, near)
    far = jax.lax.dynamic_update_slice_in_dim(far, rest, self._at, axis=2)

    def more(i, y):
      parts = self._decoded('v', i)
      weights = jax.lax.dynamic_slice_in_dim(far, i * n, n, axis=2)
      weights = weights.reshape(*probs.shape[:2], -1, len(parts))
      return y + sum(product(weights[..., k], v) for k, v in enumerate(parts))
    return jax.lax.fori_loop(0, self._chunks, more, product(near, self.v)).astype(probs.dtype)

  def attended(self, q, visible, *, scale, softcap=None, sinks=None):
    """`attention.attend_to` of the queries of one token, [B 1 H K], in one pass over the codes.

    A query that sees nothing gets zeros.
    """
    B, _, H, K = q.shape
    N = self.k.shape[0]
    rows = lambda x: jnp.broadcast_to(x, (B, H, *x.shape[2:])).reshape(
        B, N // B, -1, *x.shape[2:]).swapaxes(0, 1).reshape(N, -1, *x.shape[2:])
    codes = [attention_decode.Codes(*(self.slot.arrays[part] for part in names(name)))
             for name in 'kv']
    y = attention_decode.attention_decode(
        rows(q[:, 0]), *codes, visible.reshape(-1, visible.shape[-1]), length=self._at,
        layer=self.slot.index, recent=(self.k, self.v), bits=self.config.cache.bits, scale=scale,
        softcap=softcap, sinks=None if sinks is None else rows(sinks[None]))
    return y.reshape(N // B, B, -1, K).swapaxes(0, 1).reshape(B, 1, H, K)

  @property
  def _room(self):
    return self.slot.length('k') * 8 // self.config.cache.bits

  @property
  def _at(self):
    return self.first * self.config.cache.group

  @property
  def _size(self):
    """Tokens of a chunk: as many whole groups as divide all of them."""
    g = self.config.cache.group
    groups = self._room // g
    return g * max(n for n in range(1, max(1, _CHUNK // g) + 1) if groups % n == 0)

  @property
  def _chunks(self):
    """How many chunks have groups before the last query's."""
    each = self._size // self.config.cache.group
    return (self.last + each - 1) // each

  def _own(self, rows):
    return jnp.tile(self.own, (rows // self.own.shape[0], 1))[None]

  def _decoded(self, name, i):
    """Keys or values of chunk i as floats, as `apart` gives them."""
    parts = {part: self.slot.length(part) * self._size // self._room for part in names(name)}
    codes = attention_decode.Codes(*(
        self.slot.part(part, i * size, size) for part, size in parts.items()))
    return apart(codes, self.config.cache.bits, jnp.dtype(self.config.dtype),
                 per_token=name == 'v')


def held(slot, k, v, frame, config):
  """The slot with keys and values [G*B T K] at `frame.offset`, and the Held of queries there."""
  c, T = config.cache, k.shape[1]
  g, count = c.group, (T + c.group - 2) // c.group + 1           # groups that T tokens can be in
  first = frame.offset // g
  B = frame.known.shape[0]
  known = jnp.pad(frame.known, ((0, 0), (0, count * g)))
  known = jax.lax.dynamic_slice_in_dim(known, first * g, count * g, axis=1)
  known = jnp.tile(known, (k.shape[0] // B, 1))[:, :, None]                    # [G*B n*g 1]
  near = []
  for name, new in (('k', k), ('v', v)):
    floats = slot.part(f'{name}_recent', first % c.kept * g, g)
    floats = jnp.pad(floats, ((0, 0), (0, (count - 1) * g), (0, 0)))
    floats = jax.lax.dynamic_update_slice_in_dim(
        floats, new.astype(floats.dtype), frame.offset - first * g, axis=1)
    near.append(floats.astype(config.dtype))
    for part, value in zip(names(name), encoded(floats, known, c, per_token=name == 'v')):
      slot = overwritten(slot, part, value, first * (value.shape[1] // count), count > 1)
    # The groups that tokens come into next: those of this call, or the last of many.
    groups = first + jnp.arange(count)
    if count > c.kept:
      real = T if frame.mask is None else jnp.max(
          jnp.where(frame.mask, jnp.arange(1, T + 1)[None], 0))
      groups = (frame.offset + real) // g - jnp.arange(c.kept)[::-1]
    for k in range(min(count, c.kept)):
      part = jax.lax.dynamic_slice_in_dim(floats, (groups[k] - first) * g, g, axis=1)
      slot = slot.put(f'{name}_recent', part, groups[k] % c.kept * g)
  own = None
  if count > 1:
    own = ((frame.offset + jnp.arange(T)) // g - first)[:, None] == (jnp.arange(count * g) // g)[
        None]
  return slot, Held(slot, *near, first, (frame.offset + T - 1) // g, own, config)


def state_shapes(config, batch, length):
  """{name: (shape, dtype)} of a layer's keys and values of `length` tokens."""
  c, rows, K = config.cache, config.groups * batch, config.head_width
  groups, out = -(-length // c.group), {}
  S = groups * c.group
  for name, grids in (('k', (groups, K)), ('v', (S, K // shared(K)))):
    codes, scale, least = names(name)
    out |= {codes: ((rows, S * c.bits // 8, K), 'uint8'), scale: ((rows, *grids), 'float16'),
            least: ((rows, *grids), 'float16'),
            f'{name}_recent': ((rows, c.kept * c.group, K), config.dtype)}
  return out


def names(name):
  """The names of the arrays of codes, of scales and of least numbers."""
  return name, f'{name}_scale', f'{name}_least'


def shared(width):
  """How many of a value's channels share a grid."""
  return max(n for n in range(1, CHANNELS + 1) if width % n == 0)


def encoded(x, known, rounding, *, per_token):
  """Codes of keys or values, as `names` orders them.

  Args:
    x: [N S K], S whole groups.
    known: [N S 1] bool, which tokens are real; the others' numbers do not widen a grid.
    rounding: a Rounding.
    per_token: whether a token's channels share a grid; else a channel's tokens do.

  Returns:
    packed codes [N S*bits/8 K]; scale and least, the float16 numbers of (code * scale + least),
    [N S K/channels] or [N S/g K]. A NaN among real tokens makes all that share its grid NaN.
  """
  N, S, K = x.shape
  levels = 2 ** rounding.bits - 1
  parts, axis = x.astype(jnp.float32).reshape(_parts(x.shape, rounding, per_token)), 2
  real = jnp.ones((1,) * 4, bool)
  if per_token:
    axis = 3
  else:
    real = known.reshape(N, -1, rounding.group, 1)
  over = lambda f, none: f(jnp.where(real, parts, none), axis=axis)
  least = over(jnp.min, jnp.inf)
  most = with_nan(over(jnp.max, -jnp.inf), jnp.where(real, parts, 0), axis)
  least, most = (jnp.clip(jnp.where(least > most, 0, v), -_TOP, _TOP) for v in (least, most))
  least = least.astype(jnp.float16)
  low = least.astype(jnp.float32)
  scale = ((most - low) * (1 / levels)).astype(jnp.float16)
  step = jnp.where(scale > 0, scale.astype(jnp.float32), 1)
  wide = lambda v: jnp.expand_dims(v, axis)
  codes = jnp.clip(jnp.round((parts - wide(low)) / wide(step)), 0, levels).astype(jnp.uint8)
  return pack(codes.reshape(N, S, K), rounding.bits), scale, least


def decoded(packed, scale, least, rounding, dtype):
  """The numbers [N S K] that codes stand for, as `encoded` gives them."""
  per_token = scale.shape[1] * rounding.bits == packed.shape[1] * 8
  codes = attention_decode.Codes(packed, scale, least)
  return joined(apart(codes, rounding.bits, dtype, per_token=per_token))


def overwritten(slot, name, new, at, several):
  """The slot with `new` [N m ...] at `at`, without what goes past the end of the array."""
  if not several:
    return slot.put(name, new, at)
  rows = slot.length(name)
  size = min(new.shape[1], rows)
  start = jnp.minimum(at, rows - size)
  both = jnp.concatenate([slot.part(name, start, size), new], axis=1)
  both = jax.lax.dynamic_update_slice_in_dim(both, new, at - start, axis=1)
  return slot.put(name, both[:, :size], start)


def _parts(shape, rounding, per_token):
  """The shape in which numbers that share a grid have an axis of their own: 3 of a token's, else 2.
  """
  N, S, K = shape
  return (N, S, K // shared(K), shared(K)) if per_token else (N, -1, rounding.group, K)
