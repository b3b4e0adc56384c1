"""grouped_matmul: rows sorted by group, each times its group's matrix (a mixture's experts)."""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lean_jax.kernels.grouped_matmul import cpu, reference
from lean_jax.kernels.platforms.choice import Form, chosen

IMPLEMENTATIONS = ('blocks', 'ragged', 'reference')


def grouped_matmul(x, w, sizes, *, matrix=None, implementation=None):
  """y[m] = x[m] @ w[group of m]; no row is dropped, whatever the sizes.

  Args:
    x: [M I], float or int8; first the rows of group 0, then those of group 1, ...
    w: [E I O]; or, with `matrix`, arrays of any tree with the groups as first axis.
    sizes: [E], integer, rows of each group; 0 is allowed. Their sum is M.
    matrix: None, or the function from one group's part of `w` to its matrix [I O]: on a CPU only
      the matrices of groups with rows are made, one at a time.
    implementation: one of `IMPLEMENTATIONS`; None is 'blocks' on a CPU, where alone it runs, and
      'ragged' (`jax.lax.ragged_dot`) elsewhere. 'reference' is slow; for tests.

  Returns:
    [M O] in x's dtype, sums in float32; int32 of int8.

  Raises:
    ValueError: shapes do not fit, or an implementation that is not there or does not run here.
  """
  matrix = _identity if matrix is None else matrix
  made = jax.eval_shape(lambda w: jax.vmap(matrix)(w), w)
  shape = made.shape
  if x.ndim != 2 or len(shape) != 3 or shape[1] != x.shape[1] or sizes.shape != shape[:1]:
    raise ValueError(f'x {x.shape}, w {tuple(shape)} and sizes {sizes.shape} do not fit; expected '
                     '[M I], [E I O] and [E]')
  floats = jnp.issubdtype(x.dtype, jnp.floating)
  if not (floats or x.dtype == made.dtype == jnp.int8) or not jnp.issubdtype(
      sizes.dtype, jnp.integer):
    raise ValueError(f'x {x.dtype}, w {made.dtype} and sizes {sizes.dtype}; expected x of floats, '
                     'or both int8, and sizes of integers')
  return _product(implementation, matrix, x, w, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(implementation, matrix, x, w, sizes):
  forms = [
      Form(lambda x, w, sizes: cpu.grouped_matmul(x, w, sizes, matrix), 'blocks', ('cpu',)),
      Form(lambda x, w, sizes: _ragged(x, jax.vmap(matrix)(w), sizes), 'ragged'),
      Form(lambda x, w, sizes: reference.grouped_matmul(
          x, jax.vmap(matrix)(w).astype(x.dtype), sizes), 'reference')]
  return chosen('grouped_matmul', forms, implementation)(x, w, sizes)


def _forward(implementation, matrix, x, w, sizes):
  return _product(implementation, matrix, x, w, sizes), (x, w, sizes)


def _backward(implementation, matrix, saved, dy):
  x, w, sizes = saved
  transposed = lambda part: matrix(part).T
  dx = _product(implementation, transposed, dy, w, sizes).astype(x.dtype)
  leaves, tree = jax.tree.flatten(w)
  floats = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

  def of(train, rest):
    """The matrix of a group's arrays, the integers apart."""
    train, rest = iter(train), iter(rest)
    return matrix(tree.unflatten([next(train if f else rest) for f in floats]))

  def back(own, total):
    """The gradients of one group's arrays, from that of its matrix."""
    value, pull = jax.vjp(lambda train: of(train, own[1]), own[0])
    return pull(total.astype(value.dtype))[0]

  def ragged(x, dy, sizes, own):
    _, pull = jax.vjp(lambda train: _ragged(
        x, jax.vmap(lambda t, r: of(t, r))(train, own[1]), sizes), own[0])
    return pull(dy)[0]

  own = tuple([a for a, f in zip(leaves, floats) if f is kind] for kind in (True, False))
  forms = [Form(lambda x, dy, sizes, own: cpu.outer(x, dy, sizes, own, back), 'blocks', ('cpu',)),
           Form(ragged, 'ragged')]
  name = 'ragged' if implementation == 'reference' else implementation
  grads = iter(chosen('grouped_matmul', forms, name)(x, dy, sizes, own))
  return dx, tree.unflatten([next(grads) if f else None for f in floats]), None


_product.defvjp(_forward, _backward)


def _ragged(x, w, sizes):
  y = lax.ragged_dot(x, w.astype(x.dtype), sizes,
                     preferred_element_type=reference.result(x.dtype, sum_of=True))
  return y.astype(reference.result(x.dtype))


def _identity(w):
  return w
