"""grouped_matmul: rows sorted by group, each times its group's matrix (a mixture's experts).

`grouped_weight_only` is the same with matrices in codes. On a TPU `jax.lax.ragged_dot` goes over
every pair of an expert and a tile of rows, and of codes it writes all matrices out first; the
kernel reads the matrices of experts that have rows, as they are.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax

from lean_jax.kernels.grouped_matmul import cpu, reference
from lean_jax.kernels.platforms import device, operands
from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.kernels.weight_only_matmul import api as weight_only
from lean_jax.kernels.weight_only_matmul import cpu as native
from lean_jax.kernels.weight_only_matmul.reference import matrix as dequantized

DEEPEST = 16384               # rows of a matrix, of which a tile of the TPU kernel has all
IMPLEMENTATIONS = ('blocks', 'pallas', 'ragged', 'reference')


def grouped_matmul(x, w, sizes, *, matrix=None, implementation=None):
  """y[m] = x[m] @ w[group of m]; no row is dropped, whatever the sizes.

  Args:
    x: [M I], float or int8; first the rows of group 0, then those of group 1, ...
    w: [E I O]; or, with `matrix`, arrays of any tree with the groups as first axis.
    sizes: [E], integer, rows of each group; 0 is allowed. Their sum is M.
    matrix: None, or the function from one group's part of `w` to its matrix [I O]: on a CPU only
      the matrices of groups with rows are made, one at a time.
    implementation: one of `IMPLEMENTATIONS`; None is 'blocks' on a CPU, where alone it runs,
      'pallas' on TPUs, and 'ragged' (`jax.lax.ragged_dot`) elsewhere. 'reference' is slow; for
      tests.

  Returns:
    [M O] in x's dtype, sums in float32; int32 of int8.

  Raises:
    ValueError: shapes do not fit, or an implementation that is not there or does not run here.
  """
  of = _identity if matrix is None else matrix
  made = jax.eval_shape(lambda w: jax.vmap(of)(w), w)
  shape = made.shape
  if x.ndim != 2 or len(shape) != 3 or shape[1] != x.shape[1] or sizes.shape != shape[:1]:
    raise ValueError(f'x {x.shape}, w {tuple(shape)} and sizes {sizes.shape} do not fit; expected '
                     '[M I], [E I O] and [E]')
  floats = jnp.issubdtype(x.dtype, jnp.floating)
  bytes_ = x.dtype == jnp.int8 and made.dtype in (jnp.int8, jnp.int4, jnp.int2)
  if not (floats or bytes_) or not jnp.issubdtype(sizes.dtype, jnp.integer):
    raise ValueError(f'x {x.dtype}, w {made.dtype} and sizes {sizes.dtype}; expected x of floats, '
                     'or both int8 (w of fewer bits too), and sizes of integers')
  kernel = Form(_pallas, 'pallas', ('tpu',), _why_no_kernel(x, w, matrix), local=True)
  return _product(implementation, of, (kernel,), x, w, sizes)


def grouped_weight_only(x, values, scale, zero, spec, sizes, *, layout='packed',
                        implementation=None):
  """`grouped_matmul` with matrices in codes: `weight_only_matmul` of each group's rows.

  Gradients reach x, and scale where it is an array of floats.

  Args:
    x, sizes: as of `grouped_matmul`, x in floats.
    values, scale, zero, spec, layout: as of `weight_only_matmul`, with the groups as first axis.
    implementation: as of `grouped_matmul`.

  Returns:
    [M N], in x's dtype; sums in float32.

  Raises:
    ValueError: as of both.
  """
  if x.ndim != 2 or sizes.ndim != 1:
    raise ValueError(f'x {x.shape} and sizes {sizes.shape}; expected [M K] and [E]')
  operands.floats(x=x)
  operands.integers(sizes=sizes)
  K = x.shape[1]
  weight_only.check(sizes.shape, K, values, scale, zero, spec, layout)
  matrix = lambda w: dequantized(*w, spec, K, x.dtype, layout)
  kernels = (Form(functools.partial(_native_of_codes, spec), 'native', ('cpu',),
                  native.why_not(x, scale, zero, spec, layout), local=True),
             Form(functools.partial(_pallas_of_codes, spec), 'pallas', ('tpu',),
                  _why_none_of_codes(spec, layout, x, values, scale), local=True))
  return _product(implementation, matrix, kernels, x, (values, scale, zero), sizes)


def _why_no_kernel(x, w, matrix):
  """None, or why the TPU kernel does not take these operands."""
  if device.tpu() is None:
    return f'is for a TPU, and this program is for {device.kind()}'
  if matrix is not None or x.dtype != jnp.bfloat16 or w.dtype != jnp.bfloat16:
    return 'takes matrices and rows in bfloat16, or codes (`grouped_weight_only`)'
  return _why_not_of_shapes(x, w)


def _why_none_of_codes(spec, layout, x, values, scale):
  why = weight_only.why_no_kernel(spec, layout, x, values, scale, whole=True)
  return why or _why_not_of_shapes(x, values)


def _why_not_of_shapes(x, w):
  if x.shape[1] > DEEPEST:
    return f'takes matrices of up to {DEEPEST} rows, and these have {x.shape[1]}'
  if 0 in (*x.shape, *w.shape):
    return f'has nothing to multiply in {x.shape} and {w.shape}'
  return None


def _pallas(x, w, sizes):
  from lean_jax.kernels.grouped_matmul import tpu  # Pallas, where a TPU runs it
  return tpu.grouped_matmul(x, w, sizes)


def _native_of_codes(spec, x, w, sizes):
  return native.weight_only_matmul(x, *w, spec, sizes=sizes)


def _pallas_of_codes(spec, x, w, sizes):
  from lean_jax.kernels.grouped_matmul import tpu
  return tpu.grouped_weight_only(x, *w, spec, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(implementation, matrix, kernels, x, w, sizes):
  forms = [
      *kernels,
      Form(lambda x, w, sizes: cpu.grouped_matmul(x, w, sizes, matrix), 'blocks', ('cpu',)),
      Form(lambda x, w, sizes: _ragged(x, jax.vmap(matrix)(w), sizes), 'ragged'),
      Form(lambda x, w, sizes: reference.grouped_matmul(
          x, jax.vmap(matrix)(w).astype(x.dtype), sizes), 'reference')]
  return chosen('grouped_matmul', forms, implementation)(x, w, sizes)


def _forward(implementation, matrix, kernels, x, w, sizes):
  return _product(implementation, matrix, kernels, x, w, sizes), (x, w, sizes)


def _backward(implementation, matrix, kernels, saved, dy):
  x, w, sizes = saved
  if implementation in [k.name for k in kernels]:
    implementation = None
  transposed = lambda part: matrix(part).T
  dx = _product(implementation, transposed, (), dy, w, sizes).astype(x.dtype)
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
