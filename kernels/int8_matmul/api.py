"""int8_matmul: float activations, rounded to 8 bits row by row, times 8-bit weights."""
import functools

import jax
import jax.numpy as jnp

from lean_jax.kernels.grouped_matmul import api as grouped
from lean_jax.kernels.int8_matmul import cpu, reference
from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.quantization.packing import unpack

ACTIVATIONS = dict(relu=jax.nn.relu, silu=jax.nn.silu, gelu=jax.nn.gelu)


def _xla(x, values, scale, group, x_scale):
  codes, row_scale = reference.quantize_rows(x, x_scale)
  if group is None:
    total = jnp.matmul(codes, values, preferred_element_type=jnp.int32)
    return total.astype(jnp.float32) * row_scale * scale.astype(jnp.float32)
  G = scale.shape[-2]
  more = G * group - values.shape[-2]
  pad = lambda a, axis: jnp.pad(a, [(0, more if k == a.ndim + axis else 0) for k in range(a.ndim)])
  *batch, M, _ = x.shape
  codes = pad(codes, -1).reshape(*batch, M, G, group)
  values = pad(values, -2).reshape(*batch, G, group, -1)
  total = jnp.matmul(jnp.swapaxes(codes, -2, -3), values, preferred_element_type=jnp.int32)
  wide = scale[..., None, :].astype(jnp.float32)                          # [*E G 1 N]
  return jnp.sum(total.astype(jnp.float32) * wide, axis=-3) * row_scale


def int8_matmul(x, values, scale, *, group=None, bits=8, x_scale=None, bias=None, activation=None,
                implementation=None):
  """x @ (values * scale) with x rounded to 8 bits, one range a row, and int32 accumulation.

  The scheme is that of Dettmers et al. 2022 (arXiv:2208.07339), section 2.1, 'vector-wise'.
  The gradient passes straight through the rounding of x.

  Args:
    x: [*E M K], float.
    values: [*E K N], int8; of four bits [*E ceil(K / 2) N] uint8, packed as
      `quantization.packing.pack` does.
    scale: [*E G N] or [*E G 1], float: of each group of rows of values, and of each column or of
      all.
    group: rows of a group, the last may be shorter; None is all of them, G = 1.
    bits: of values, 8 or 4.
    x_scale: None, or [*E], the step to which all rows of x are rounded instead of their own.
    bias: None, or [N] or [*E 1 N], float: added to the product.
    activation: None, or one of ACTIVATIONS, of the product and the bias.
    implementation: None is the fastest that the platform has for these operands; or 'xla', or
      'reference' (slow; for tests).

  Returns:
    [*E M N], float32.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation or activation that is not there or
      does not run here.
  """
  kinds = {8: jnp.int8, 4: jnp.uint8}
  if bits not in kinds or values.dtype != kinds[bits]:
    raise ValueError(f'values are {values.dtype} of {bits} bits; expected int8 of 8, or uint8 of '
                     '4, two codes in a byte along the axis that is summed over')
  *batch, _, N = values.shape
  K = x.shape[-1]
  rows = K if bits == 8 else (K + 1) // 2
  if x.ndim != values.ndim or x.shape[:-2] != tuple(batch) or values.shape[-2] != rows:
    raise ValueError(f'x {x.shape} does not fit values {values.shape} of {bits} bits; expected '
                     f'values [*E {rows} N] for it')
  G = -(-K // group) if group else 1
  if scale.shape not in ((*batch, G, N), (*batch, G, 1)):
    raise ValueError(f'scale {scale.shape} does not fit values {values.shape}; expected '
                     f'{(*batch, G, N)}')
  if activation not in (None, *ACTIVATIONS):
    raise ValueError(f'activation {activation!r}; expected one of {", ".join(ACTIVATIONS)}')
  y = _product(implementation, group, bits, x, values, scale, x_scale)
  if bias is not None:
    y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
  return y if activation is None else ACTIVATIONS[activation](y)


def forms(group, bits, x, values, scale, x_scale):
  """Its Forms for these operands, the fastest first."""
  del values, x_scale
  native = functools.partial(_native, group, bits)
  whole = lambda run: functools.partial(_unpacked, run, group, bits)
  why_not = cpu.why_not(x, scale, group or x.shape[-1], bits)
  return [Form(native, 'native', ('cpu',), why_not, local=True), Form(whole(_xla), 'xla'),
          Form(whole(reference.int8_matmul), 'reference')]


def _native(group, bits, x, values, scale, x_scale):
  return cpu.int8_matmul(x, values, scale, group or x.shape[-1], bits, x_scale)


def _unpacked(run, group, bits, x, values, scale, x_scale):
  return run(x, integers(values, bits, x.shape[-1]), scale, group, x_scale)


def integers(values, bits, rows):
  """Packed values as int8 [*E K N], K = `rows`."""
  if bits == 8:
    return values
  return (unpack(values, bits, rows) ^ 8).astype(jnp.int8) - jnp.int8(8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(implementation, group, bits, x, values, scale, x_scale):
  run = chosen('int8_matmul', forms(group, bits, x, values, scale, x_scale), implementation)
  return run(x, values, scale, x_scale)


def _forward(implementation, group, bits, x, values, scale, x_scale):
  return (_product(implementation, group, bits, x, values, scale, x_scale),
          (x, values, scale, x_scale))


def _backward(implementation, group, bits, saved, g):
  x, values, scale, x_scale = saved
  values = integers(values, bits, x.shape[-1])
  group = group or values.shape[-2]
  rows = jnp.repeat(scale.astype(g.dtype), group, axis=-2)[..., :values.shape[-2], :]
  wide = values.astype(g.dtype)
  dx = jnp.matmul(g, jnp.swapaxes(wide * rows, -1, -2)).astype(x.dtype)
  codes, step = reference.quantize_rows(x, x_scale)
  rounded = (codes * step).astype(g.dtype)
  each = jnp.matmul(jnp.swapaxes(rounded, -1, -2), g) * wide                # [*E K N]
  dscale = _sum_of_groups(each, group)
  if scale.shape[-1] == 1:
    dscale = jnp.sum(dscale, axis=-1, keepdims=True)
  return dx, None, dscale.astype(scale.dtype), None if x_scale is None else jnp.zeros_like(x_scale)


def _sum_of_groups(x, group):
  """[..., I, O] as [..., G, O]."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % group), (0, 0)])
  *batch, I, O = x.shape
  return jnp.sum(x.reshape(*batch, I // group, group, O), axis=-2)


_product.defvjp(_forward, _backward)


def int8_grouped_matmul(x, values, scale, sizes, *, group=None, x_scale=None):
  """`int8_matmul` of each expert's rows with its own values and scales.

  Args:
    x: [M K], float; first the rows of expert 0, then those of expert 1, ...
    values: [E K N], int8.
    scale: [E G N] or [E G 1], float.
    sizes: [E], integer, rows of each expert; their sum is M.
    group: rows of values that share a scale; None is all of them, G = 1.
    x_scale: None, or [E], the step to which all rows of an expert are rounded.

  Returns:
    [M N], float32.
  """
  scale = jnp.broadcast_to(scale, (*scale.shape[:2], values.shape[-1]))
  return _grouped(group or values.shape[1], x, values, scale, sizes, x_scale)


def _rows(x, sizes, x_scale):
  if x_scale is None:
    return reference.quantize_rows(x)
  step = jnp.repeat(x_scale, sizes, total_repeat_length=x.shape[0])[:, None]
  codes, step = reference.quantize_rows(x[:, None], step[:, 0])
  return codes[:, 0], step[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(group, x, values, scale, sizes, x_scale):
  codes, row_scale = _rows(x, sizes, x_scale)
  total = 0.
  for k, span in _spans(group, values):
    part = grouped.grouped_matmul(codes[:, span], values[:, span], sizes)
    total = total + part.astype(jnp.float32) * _each_row(scale[:, k], sizes, x)
  return total * row_scale


def _grouped_forward(group, x, values, scale, sizes, x_scale):
  return _grouped(group, x, values, scale, sizes, x_scale), (x, values, scale, sizes, x_scale)


def _grouped_backward(group, saved, g):
  x, values, scale, sizes, x_scale = saved
  transposed = lambda part: part.T.astype(g.dtype)
  codes, step = _rows(x, sizes, x_scale)
  rounded = (codes * step).astype(g.dtype)
  expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
  dx, dscale = [], []
  for k, span in _spans(group, values):
    part = values[:, span]
    dx.append(grouped.grouped_matmul(g * _each_row(scale[:, k], sizes, x), part, sizes,
                                     matrix=transposed))
    unscaled = grouped.grouped_matmul(rounded[:, span], part, sizes)
    dscale.append(jax.ops.segment_sum(g * unscaled, expert, sizes.shape[0],
                                      indices_are_sorted=True))
  return (jnp.concatenate(dx, axis=-1).astype(x.dtype), None,
          jnp.stack(dscale, axis=1).astype(scale.dtype), None,
          None if x_scale is None else jnp.zeros_like(x_scale))


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _spans(group, values):
  """(k, rows of values [E K N] in group k), the last one shorter where they do not fill it."""
  return [(k, slice(start, start + group))
          for k, start in enumerate(range(0, values.shape[1], group))]


def _each_row(scale, sizes, x):
  """[M N], the scales [E N] of each row's expert."""
  return jnp.repeat(scale, sizes, axis=0, total_repeat_length=x.shape[0])
