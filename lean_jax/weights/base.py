"""Weights: the things a model multiplies by.

A model never sees an array, only `w.einsum(eqn, x)`. A weight is a pytree node, so jit, grad,
optax and shardings see its arrays; and a Flax box, so that any other Linen module (`nn.Dense`)
that asks for it as a parameter is given its dense value, `unbox()`.

dims, one letter an axis: i summed over, o kept, e batched (experts), n stacked (layers).
axes, one name an axis: the logical names from which shardings follow.
"""
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from lean_jax.kernels.grouped_matmul import api as grouped_matmul


def static(**kw):
  """A field of a weight that is no array."""
  return dataclasses.field(metadata=dict(static=True), **kw)


def static_names(kind):
  """The names of the fields of `kind` that are no arrays."""
  return [f.name for f in dataclasses.fields(kind) if f.metadata.get('static')]


def pytree(cls):
  """Makes `cls` a frozen dataclass and a pytree node; `static()` fields are no arrays.

  Not by `register_dataclass`, whose trees of different classes compare as equal (jax 0.10 to 0.12):
  a compiled program's cache may then give one kind of weight that of another.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  fixed = tuple(static_names(cls))
  arrays = tuple(f.name for f in dataclasses.fields(cls) if f.name not in fixed)
  keys = tuple(jax.tree_util.GetAttrKey(name) for name in arrays)
  values = lambda w, names: tuple(getattr(w, name) for name in names)

  def unflatten(static, children):
    new = object.__new__(cls)
    for name, value in zip(arrays + fixed, (*children, *static)):
      object.__setattr__(new, name, value)
    return new
  jax.tree_util.register_pytree_with_keys(
      cls, lambda w: (tuple(zip(keys, values(w, arrays))), values(w, fixed)), unflatten,
      lambda w: (values(w, arrays), values(w, fixed)))
  return cls


class Weight(meta.AxisMetadata):
  """What every weight can do. A new kind must say `unbox` and `names`; the rest is speed.

  One law holds for every kind and every nesting of kinds:
  `w.einsum(eqn, x) == jnp.einsum(eqn, x, w.unbox())`, up to the rounding of the activations
  where the kind rounds them too; and `w.grouped` is `w.einsum` of each expert by itself.
  """

  dims: str
  axes: tuple

  @property
  def shape(self):
    """The shape of the dense value."""
    return jax.eval_shape(meta.unbox, self).shape

  def names(self):
    """This weight with, in the place of each array, the logical names of its axes."""
    raise TypeError(f'{type(self).__name__} does not name its axes')

  def einsum(self, eqn, x):
    """The product of x with the weight, in x's dtype; `eqn` as in jnp.einsum.

    It is made of matrices: XLA:CPU multiplies those, and their gradients' transposes, faster than
    products with several batch axes.
    """
    w = self.unbox()
    x2, restore = as_matmul(eqn, x, self.dims, w.shape)
    return restore(x2 @ to_matrix(w, self.dims).astype(x.dtype))

  def grouped(self, x, sizes):
    """Each row of x times its expert's matrix: `einsum` with the experts' rows apart.

    Args:
      x: [M I], first the rows of expert 0, then those of expert 1, ... I is all of dims' i.
      sizes: [E], integer, rows of each expert; their sum is M.

    Returns:
      [M O], in x's dtype; O is all of dims' o.
    """
    return grouped_matmul.grouped_matmul(x, to_matrix(self.unbox(), self.dims), sizes)

  def bias(self, b):
    """What is added to the product where the model's bias is b [*n *e *o]; b itself, for most."""
    return b

  def take(self, ids):
    """Rows `ids` of the dense value: an embedding's lookup. [*ids, ...]"""
    return jnp.take(self.unbox(), ids, axis=0)

  def add_axis(self, index, params):
    """The same weight with a layer axis at `index`; nn.scan and nn.vmap call it."""
    name = params.get(nn.PARTITION_NAME, 'layers')
    return self._replace_axes(self.dims[:index] + 'n' + self.dims[index:],
                              self.axes[:index] + (name,) + self.axes[index:])

  def remove_axis(self, index, params):
    """The same weight without the layer axis at `index`."""
    cut = lambda t: t[:index] + t[index + 1:]
    return self._replace_axes(cut(self.dims), cut(self.axes))

  @staticmethod
  def alike(weights):
    """Weights of this kind, of several layers, with arrays of the same shapes: to be stacked."""
    return weights

  def _replace_axes(self, dims, axes):
    return dataclasses.replace(self, dims=dims, axes=axes)

  def replace_boxed(self, value):
    """Not possible for a weight of several arrays; Flax calls it on nn.map_variables."""
    raise TypeError(f'{type(self).__name__} holds no single array to replace')


class Wrapper(Weight):
  """A weight made of another, `base`."""
  base: Weight
  dims = property(lambda self: self.base.dims)
  axes = property(lambda self: self.base.axes)

  def bias(self, b):
    return self.base.bias(b)

  def _replace_axes(self, dims, axes):
    return dataclasses.replace(self, base=self.base._replace_axes(dims, axes))


def positions(dims, letters):
  """Where in `dims` one of `letters` stands."""
  return tuple(k for k, d in enumerate(dims) if d in letters)


def broadcast(vector, dims, kind):
  """[*n *e *kind], `kind` being i or o, with axes of length 1 as it multiplies the dense value."""
  at = positions(dims, 'n') + positions(dims, 'e') + positions(dims, kind)
  size = dict(zip(at, vector.shape))
  vector = vector.transpose(sorted(range(len(at)), key=lambda k: at[k]))
  return vector.reshape([size.get(k, 1) for k in range(len(dims))])


def times(eqn, x, side, vector, dims):
  """x, an equation's input or its result, times a vector [*e *side] of the weight's axes.

  Args:
    eqn: as of `Weight.einsum`.
    side: 'i', x being what the weight multiplies; or 'o', x being the product.
    dims: of the weight, without stacked axes.
  """
  xs, rest = eqn.split(',')
  ws, out = rest.split('->')
  names = xs if side == 'i' else out
  own = ''.join(ws[k] for k in positions(dims, 'e') + positions(dims, side))
  return jnp.einsum(f'{names},{own}->{names}', x, vector.astype(x.dtype))


def times_rows(x, vector, sizes):
  """`times` of rows [M ...], each expert's together as in `Weight.grouped`; vector [E ...]."""
  flat = vector.reshape(sizes.shape[0], -1).astype(x.dtype)
  return x * jnp.repeat(flat, sizes, axis=0, total_repeat_length=x.shape[0])


def unstacked(shape, dims):
  """The sizes of the dense axes but the stacked ones."""
  return tuple(n for n, d in zip(shape, dims) if d != 'n')


def to_matrix(value, dims):
  """A dense value as [*n *e I O]: stacked and batched axes first, then one axis a side."""
  order = positions(dims, 'n') + positions(dims, 'e') + positions(dims, 'i') + positions(dims, 'o')
  batch = tuple(value.shape[k] for k in positions(dims, 'n') + positions(dims, 'e'))
  I = math.prod(value.shape[k] for k in positions(dims, 'i'))
  O = math.prod(value.shape[k] for k in positions(dims, 'o'))
  return value.transpose(order).reshape(*batch, I, O)


def from_matrix(matrix, dims, sizes):
  """The inverse of `to_matrix`; `sizes` are those of the dense axes other than the stacked ones."""
  order = positions(dims, 'n') + positions(dims, 'e') + positions(dims, 'i') + positions(dims, 'o')
  size = iter(sizes)
  full = {k: None if d == 'n' else next(size) for k, d in enumerate(dims)}
  stacked = iter(matrix.shape)
  shape = [next(stacked) if dims[k] == 'n' else full[k] for k in order]
  inverse = [order.index(k) for k in range(len(dims))]
  return matrix.reshape(shape).transpose(inverse)


def matrix_names(dims, axes):
  """The logical names of `to_matrix`'s axes; a merged axis has the name of its first named one."""
  pick = lambda d: [axes[k] for k in positions(dims, d)]
  first = lambda names: next((n for n in names if n is not None), None)
  return (*pick('n'), *pick('e'), first(pick('i')), first(pick('o')))


def as_matmul(eqn, x, dims, sizes):
  """Brings a product to matrices.

  Args:
    eqn: of x and a dense weight, as in jnp.einsum; no ellipsis, no repeated letter.
    x: the activations.
    dims, sizes: of the weight, without stacked axes.

  Returns:
    x as [*e M I], and the function from [*e M O] to the result of the equation.
  """
  xs, rest = eqn.split(',')
  ws, out = rest.split('->')
  size = dict(zip(xs, x.shape)) | dict(zip(ws, sizes))
  of = lambda kind: ''.join(c for c, d in zip(ws, dims) if d == kind)
  e, i, o = of('e'), of('i'), of('o')
  m = ''.join(c for c in xs if c not in e + i)
  count = lambda letters: math.prod(size[c] for c in letters)
  batch = tuple(size[c] for c in e)
  x = jnp.einsum(f'{xs}->{e}{m}{i}', x).reshape(*batch, count(m), count(i))

  def restore(y):
    y = y.reshape([size[c] for c in e + m + o])
    return jnp.einsum(f'{e}{m}{o}->{out}', y)
  return x, restore
