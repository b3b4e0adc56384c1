"""grouped_matmul for CPUs, where `jax.lax.ragged_dot` multiplies every row by every matrix.

A loop over the groups that have rows, and in it one over blocks of rows. Blocks are read where they
stand: the last one of a group reaches into the next group's rows, which that one then overwrites.
A group's matrix is made once, when its turn comes, and never for a group without rows.
"""
import jax
import jax.numpy as jnp
from jax import lax

from lean_jax.kernels.grouped_matmul.reference import result

_MOST = 32                    # rows of a block: more gain nothing, and fill the last ones in vain


def grouped_matmul(x, parts, sizes, matrix):
  """[M O] of rows x [M I] and `matrix` [I O] of each group's parts."""
  M, I = x.shape
  B = rows(M, sizes.shape[0])
  one = jax.eval_shape(lambda p: matrix(part(p, 0)), parts)
  start = jnp.cumsum(sizes) - sizes
  order = jnp.argsort(sizes == 0, stable=True)                       # those with rows first
  x = jnp.pad(x, ((0, B), (0, 0)))

  def group(k, y):
    e = order[k]
    w = matrix(part(parts, e)).astype(x.dtype)

    def block(j, y):
      at = (start[e] + j * B, 0)
      new = jnp.matmul(lax.dynamic_slice(x, at, (B, I)), w,
                       preferred_element_type=result(x.dtype, sum_of=True))
      return lax.dynamic_update_slice(y, new.astype(y.dtype), at)
    return lax.fori_loop(0, blocks(sizes[e], B), block, y)

  y = jnp.zeros((M + B, one.shape[1]), result(x.dtype))
  return lax.fori_loop(0, jnp.sum(sizes > 0), group, y)[:M]


def outer(x, dy, sizes, parts, back):
  """`back` of each group's parts and sum of x^T dy [I O], over its rows; stacked."""
  (M, I), (_, O) = x.shape, dy.shape
  B = rows(M, sizes.shape[0])
  x, dy = (jnp.pad(a, ((0, B), (0, 0))) for a in (x, dy))
  start = jnp.cumsum(sizes) - sizes

  def group(_, inputs):
    own, first, size = inputs

    def block(j, total):
      at = (first + j * B, 0)
      inside = (j * B + jnp.arange(B) < size)[:, None]
      left, right = (jnp.where(inside, lax.dynamic_slice(a, at, (B, n)), 0)
                     for a, n in ((x, I), (dy, O)))
      return total + jnp.matmul(left.T, right, preferred_element_type=total.dtype)
    zero = jnp.zeros((I, O), result(x.dtype, sum_of=True))
    return None, back(own, lax.fori_loop(0, blocks(size, B), block, zero))

  return lax.scan(group, None, (parts, start, sizes))[1]


def rows(M, E):
  """Rows of a block: half of a group's average, a power of two."""
  half = max(1, M // (2 * E))
  return min(_MOST, 1 << (half.bit_length() - 1))


def blocks(size, B):
  """How many blocks a group has."""
  return (size + B - 1) // B


def part(parts, e):
  """The parts of one group."""
  return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, 0, keepdims=False), parts)
