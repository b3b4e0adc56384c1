"""int8_matmul: float activations, rounded to 8 bits row by row, times 8-bit weights."""
import functools

import jax
import jax.numpy as jnp

from lean_jax.kernels.grouped_matmul import api as grouped
from lean_jax.kernels.int8_matmul import reference


def _xla(x, values, scale):
  codes, row_scale = reference.quantize_rows(x)
  total = jnp.matmul(codes, values, preferred_element_type=jnp.int32)
  return total.astype(jnp.float32) * row_scale * scale


IMPLEMENTATIONS = {'reference': reference.int8_matmul, 'xla': _xla}


def int8_matmul(x, values, scale, *, implementation='xla'):
  """x @ (values * scale) with x rounded to 8 bits, one range a row, and int32 accumulation.

  The scheme is that of Dettmers et al. 2022 (arXiv:2208.07339), section 2.1, 'vector-wise'.
  The gradient passes straight through the rounding of x.

  Args:
    x: [*E M K], float.
    values: [*E K N], int8.
    scale: [*E 1 N], float32.
    implementation: 'xla', or 'reference' (slow; for tests).

  Returns:
    [*E M N], float32.

  Raises:
    ValueError: shapes or dtypes do not fit, or there is no such implementation.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f'no implementation {implementation!r}; there are: '
                     f'{", ".join(IMPLEMENTATIONS)}')
  if values.dtype != jnp.int8:
    raise ValueError(f'values are {values.dtype}; expected int8')
  *batch, K, N = values.shape
  if x.ndim != values.ndim or x.shape[:-2] != tuple(batch) or x.shape[-1] != K:
    raise ValueError(f'x {x.shape} does not fit values {values.shape}; expected [*E M {K}]')
  if scale.shape != (*batch, 1, N):
    raise ValueError(f'scale {scale.shape} does not fit values {values.shape}; expected '
                     f'{(*batch, 1, N)}')
  return _product(implementation, x, values, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(implementation, x, values, scale):
  return IMPLEMENTATIONS[implementation](x, values, scale)


def _forward(implementation, x, values, scale):
  return _product(implementation, x, values, scale), (x, values, scale)


def _backward(implementation, saved, g):
  x, values, scale = saved
  transposed = jnp.swapaxes(values, -1, -2).astype(g.dtype)
  dx = jnp.matmul(g * scale, transposed).astype(x.dtype)
  unscaled = jnp.matmul(x.astype(g.dtype), values.astype(g.dtype))
  return dx, None, jnp.sum(g * unscaled, axis=-2, keepdims=True)


_product.defvjp(_forward, _backward)


def int8_grouped_matmul(x, values, scale, sizes):
  """`int8_matmul` of each group of rows with its own values and scales.

  Args:
    x: [M K], float; first the rows of group 0, then those of group 1, ...
    values: [E K N], int8.
    scale: [E 1 N], float32.
    sizes: [E], integer, rows of each group; their sum is M.

  Returns:
    [M N], float32.
  """
  return _grouped(x, values, scale, sizes)


@jax.custom_vjp
def _grouped(x, values, scale, sizes):
  codes, row_scale = reference.quantize_rows(x)
  total = grouped.grouped_matmul(codes, values, sizes)
  return total.astype(jnp.float32) * row_scale * _each_row(scale, sizes, x)


def _grouped_forward(x, values, scale, sizes):
  return _grouped(x, values, scale, sizes), (x, values, scale, sizes)


def _grouped_backward(saved, g):
  x, values, scale, sizes = saved
  transposed = lambda part: part.T.astype(g.dtype)
  dx = grouped.grouped_matmul(g * _each_row(scale, sizes, x), values, sizes, matrix=transposed)
  unscaled = grouped.grouped_matmul(x.astype(g.dtype), values, sizes)
  group = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
  dscale = jax.ops.segment_sum(g * unscaled, group, sizes.shape[0], indices_are_sorted=True)
  return dx.astype(x.dtype), None, dscale[:, None], None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _each_row(scale, sizes, x):
  """[M N], the scales of each row's group."""
  return jnp.repeat(scale[:, 0], sizes, axis=0, total_repeat_length=x.shape[0])
