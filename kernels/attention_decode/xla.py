"""attention_decode in plain JAX: some tokens at a time, so that never all codes are floats."""
import jax.numpy as jnp
from jax import lax

from lean_jax.kernels.attention_decode.codes import Codes, apart
from lean_jax.kernels.attention_decode.softmax import more, nothing

CHUNK = 256                   # tokens, at most


def part(how, q, read, size, visible, length):
  """The Part of tokens in codes.

  Args:
    how: a Scores.
    q: [N R K].
    read: a function from the number of a chunk to Codes of its keys and of its values.
    size: tokens of a chunk.
    visible: [B S] bool, N a multiple of B.
    length: tokens, from the first, that are read at all; scalar.
  """
  (N, _, _), each = q.shape, 8 // how.bits
  wide = jnp.promote_types(q.dtype, jnp.float32)

  def step(i, found):
    k, v = read(i)
    keys = apart(k, how.bits, q.dtype, per_token=False)
    scores = [how.of(_product(q, x, 2).astype(wide)) for x in keys]
    seen = lax.dynamic_slice_in_dim(visible, i * size, size, axis=1)
    seen = seen & (i * size + jnp.arange(size) < length)[None]
    seen = jnp.tile(seen, (N // visible.shape[0], 1))[:, None]                       # [N 1 size]

    def mix(probs):
      values = apart(v, how.bits, q.dtype, per_token=True)
      return sum(_product(p.astype(q.dtype), x, 1) for p, x in zip(probs, values))
    return more(found, scores, [seen[..., e::each] for e in range(each)], mix)
  return lax.fori_loop(0, (length + size - 1) // size, step, nothing(q.shape, wide))


def recent(how, found, q, near, seen):
  """The Part with tokens in floats: near, keys and values [N g K]; seen [B g] bool."""
  k, v = (x.astype(q.dtype) for x in near)
  seen = jnp.tile(seen, (q.shape[0] // seen.shape[0], 1))[:, None]
  return more(found, [how.of(_product(q, k, 2))], [seen],
              lambda probs: _product(probs[0].astype(q.dtype), v, 1))


def contiguous(k, v, size, layer):
  """`part`'s read of Codes of N rows, of all layers' where `layer` is a number."""
  S = v.scale.shape[-2]

  def cut(x, i):
    lead = () if layer is None else (layer,)
    rows, *rest = x.shape[len(lead):]
    n = rest[0] * size // S
    at = (*lead, 0, i * n, *(0,) * (len(rest) - 1))
    shape = (rows, n, *rest[1:])
    return lax.dynamic_slice(x, at, (1,) * len(lead) + shape).reshape(shape)
  return lambda i: tuple(Codes(*(cut(x, i) for x in codes)) for codes in (k, v))


def paged(k, v, table):
  """`part`'s read of Codes of pages."""
  def read(i):
    at = lax.dynamic_index_in_dim(table, i, 1, keepdims=False)                         # [N]
    return tuple(Codes(*(x[at] for x in codes)) for codes in (k, v))
  return read


def chunk(S, g):
  """Tokens of a chunk: as many whole groups as divide all of them."""
  groups = S // g
  return g * max(n for n in range(1, max(1, CHUNK // g) + 1) if groups % n == 0)


def _product(a, b, axis):
  """[N R K] times [N S K] over `axis` of the second, in float32 at least."""
  return lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))),
                         preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
