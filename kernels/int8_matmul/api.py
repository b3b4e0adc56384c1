"""int8_matmul: float activations, rounded to 8 bits row by row, times 8-bit weights."""
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.kernels.grouped_matmul import api as grouped
from lean_jax.kernels.int8_matmul import cpu, reference
from lean_jax.kernels.platforms import device, operands
from lean_jax.kernels.platforms.choice import Form, chosen
from lean_jax.quantization import layouts
from lean_jax.quantization.packing import unpack

ACTIVATIONS = dict(relu=jax.nn.relu, silu=jax.nn.silu, gelu=jax.nn.gelu)


# The dtypes that values may have in a layout of `quantization.layouts`; uint8 is two codes a byte.
LAYOUTS = dict(packed=('int8', 'uint8'), int4=('int2', 'int4', 'int8'), columns=('int8',),
               panels=('int8', 'uint8'))


def _xla(x, values, scale, x_scale, group):
  codes, row_scale = reference.quantize_rows(x, x_scale)
  values = values.astype(jnp.int8)
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


def int8_matmul(x, values, scale, *, group=None, x_scale=None, bias=None, activation=None,
                layout='packed', dtype=jnp.float32, implementation=None):
  """x @ (values * scale) with x rounded to 8 bits, one range a row, and int32 accumulation.

  The scheme is that of Dettmers et al. 2022 (arXiv:2208.07339), section 2.1, 'vector-wise'.
  The gradient passes straight through the rounding of x.

  Args:
    x: [*E M K], float.
    values: [*E K N], int8; or codes of four bits, [*E ceil(K / 2) N] uint8, packed as
      `quantization.packing.pack` does; of layout 'int4' jnp.int2 or int4 too; of 'columns'
      [*E N K]; of 'panels' [*E N/64 rows/4 256].
    scale: [*E G N] or [*E G 1], float: of each group of rows of values, and of each column or of
      all.
    group: rows of a group, the last may be shorter; None is all of them, G = 1.
    x_scale: None, or [*E], the step to which all rows of x are rounded instead of their own.
    bias: None, or [N] or [*E 1 N], float: added to the product.
    activation: None, or one of ACTIVATIONS, of the product and the bias.
    layout: one of LAYOUTS, how values lie in memory.
    dtype: of the result; everything before it is float32.
    implementation: None is the fastest that the platform has for these operands; or 'native' (a
      kernel, on CPUs), 'pallas' (on TPUs with int8 units and NVIDIA
      Hoppers), 'xla', or 'reference' (slow; for tests).

  Returns:
    [*E M N], in dtype.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation, layout or activation that is not
      there or does not run here.
  """
  if layout not in LAYOUTS:
    raise ValueError(f'layout {layout!r}; expected one of {", ".join(LAYOUTS)}')
  if values.dtype not in LAYOUTS[layout]:
    raise ValueError(f'values are {values.dtype}; expected {" or ".join(LAYOUTS[layout])}, as '
                     f'layout {layout!r} has them')
  batch, rows, N = _logical(values.shape, layout)
  K = x.shape[-1] if x.ndim else 0
  if x.ndim != len(batch) + 2 or x.shape[:-2] != batch or rows != _rows_of(K, values, layout):
    more = (2 if values.dtype == jnp.uint8 else 1) * (4 if layout == 'panels' else 1)
    raise ValueError(f'x {x.shape} does not fit values {values.shape}; expected '
                     f'[*E M {more * rows}]')
  G = operands.groups(group, K)
  if scale.shape not in ((*batch, G, N), (*batch, G, 1)):
    raise ValueError(f'scale {scale.shape} does not fit values {values.shape}; expected '
                     f'{(*batch, G, N)}')
  operands.floats(x=x, scale=scale, x_scale=x_scale, bias=bias)
  _check_steps(x_scale, x, batch)
  if activation not in (None, *ACTIVATIONS):
    raise ValueError(f'activation {activation!r}; expected one of {", ".join(ACTIVATIONS)}')
  if bias is not None:
    if bias.shape not in ((N,), (*batch, 1, N)):
      raise ValueError(f'bias {bias.shape} does not fit values {values.shape}; expected {(N,)} or '
                       f'{(*batch, 1, N)}')
    bias = bias.reshape((1,) * (x.ndim - bias.ndim) + bias.shape)
  how = How(implementation, group, layout, activation, jnp.dtype(dtype).name)
  return _product(how, x, values, scale, x_scale, bias)


def _check_steps(x_scale, x, batch):
  if x_scale is not None and x_scale.shape != tuple(batch):
    raise ValueError(f'x_scale {x_scale.shape} does not fit x {x.shape}; expected {tuple(batch)}, '
                     'one step a matrix')


class How(NamedTuple):
  """The arguments of a call that are no arrays."""
  implementation: str | None
  group: int | None
  layout: str
  activation: str | None
  dtype: str


def forms(how, x, values, scale):
  """Its Forms for these operands, the fastest first."""
  written = lambda run: functools.partial(_unfused, run, how)
  why = _why_no_kernel(how, x, values)
  why_not = cpu.why_not(x, values, scale, how.group or x.shape[-1], how.layout)
  return [Form(written(_native), 'native', ('cpu',), why_not, local=True),
          Form(functools.partial(_pallas, how), 'pallas', ('tpu',), why, local=True),
          Form(functools.partial(_hopper, how), 'pallas', ('cuda',),
               _why_not_hopper(how, x, values), local=True),
          Form(written(_xla), 'xla'), Form(written(reference.int8_matmul), 'reference')]


def _why_no_kernel(how, x, values):
  """None, or why the TPU kernel does not take these operands."""
  why = device.why_no_int8()
  if why is None and values.dtype == jnp.uint8:
    why = "takes codes of four bits in layout 'int4' (lean_jax.weights.prepared)"
  if why is None and how.layout not in ('packed', 'int4'):
    why = f"takes layouts 'packed' and 'int4', and this is {how.layout!r}"
  if why is None and how.group and how.group % 32:
    why = f'takes groups of multiples of 32 rows, and these have {how.group}'
  if why is None and 0 in (*x.shape, *values.shape):
    why = f'has nothing to multiply in {x.shape} and {values.shape}'
  return why


def _why_not_hopper(how, x, values):
  """None, or why the GPU kernel does not take these operands."""
  why = device.why_no_hopper()
  if why is None and how.layout != 'columns':
    why = f"takes layout 'columns' (lean_jax.weights.prepared), and this is {how.layout!r}"
  if why is None and how.group and how.group < x.shape[-1]:
    why = f'takes one scale a column, and these have groups of {how.group} rows'
  if why is None and 0 in (*x.shape, *values.shape):
    why = f'has nothing to multiply in {x.shape} and {values.shape}'
  if why is not None:
    return why
  from lean_jax.kernels.int8_matmul import gpu  # Pallas, where a GPU runs it
  (*batch, M, _), N = x.shape, values.shape[-2]
  if M <= gpu.ROWS // 2 or math.prod(batch) * gpu.blocks(M, N) < gpu.LEAST:
    return (f'is for more than {gpu.ROWS // 2} rows, and at least {gpu.LEAST} blocks of '
            f'{gpu.ROWS} x {gpu.COLUMNS} of the result: XLA cuts {(*batch, M, N)} smaller')
  return None


def _hopper(how, x, values, scale, x_scale, bias):
  from lean_jax.kernels.int8_matmul import gpu  # Pallas, where a GPU runs it
  return gpu.int8_matmul(x, values, scale, x_scale, bias, dtype=how.dtype,
                         activation=how.activation and ACTIVATIONS[how.activation])


def _pallas(how, x, values, scale, x_scale, bias):
  from lean_jax.kernels.int8_matmul import tpu  # Pallas, where a TPU runs it
  return tpu.int8_matmul(x, values, scale, x_scale, bias, group=how.group, dtype=how.dtype,
                         activation=how.activation and ACTIVATIONS[how.activation])


def _native(x, values, scale, x_scale, group):
  return cpu.int8_matmul(x, values, scale, group or x.shape[-1], x_scale)


def _unfused(run, how, x, values, scale, x_scale, bias):
  if run is not _native:
    values = _integers(how, values, x.shape[-1])
  return _end(how, run(x, values, scale, x_scale, how.group), bias)


def _rows_of(K, values, layout):
  """Rows of values for K of the weight; of 'panels' pieces of four."""
  rows = (K + 1) // 2 if values.dtype == jnp.uint8 else K
  return -(-rows // 4) if layout == 'panels' else rows


def _integers(how, values, rows):
  """Values as [*E K N], an element a code; K = `rows`."""
  if how.layout == 'int4':
    return values
  packed = values.dtype == jnp.uint8
  values = layouts.in_rows(values, how.layout, layouts.byte_rows(rows, 4 if packed else 8))
  return (unpack(values, 4, rows) ^ 8).astype(jnp.int8) - jnp.int8(8) if packed else values


def _end(how, y, bias):
  """The product with what follows it."""
  if bias is not None:
    y = y + bias.astype(y.dtype)
  y = y if how.activation is None else ACTIVATIONS[how.activation](y)
  return y.astype(how.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how, x, values, scale, x_scale, bias):
  run = chosen('int8_matmul', forms(how, x, values, scale), how.implementation)
  return run(x, values, scale, x_scale, bias)


def _forward(how, x, values, scale, x_scale, bias):
  """The product alone where an activation's slope is needed; it is the same function."""
  if how.activation is None:
    return _product(how, x, values, scale, x_scale, bias), (x, values, scale, x_scale, bias, None)
  alone = how._replace(activation=None, dtype='float32')
  product = _product(alone, x, values, scale, x_scale, None)
  return _end(how, product, bias), (x, values, scale, x_scale, bias, product)


def _backward(how, saved, g):
  x, values, scale, x_scale, bias, product = saved
  if product is None:
    g, dbias = g.astype(jnp.float32), bias
    if bias is not None:
      dbias = _summed_to(g, bias)
  else:
    _, pull = jax.vjp(lambda y, b: _end(how, y, b), product, bias)
    g, dbias = pull(g)
  dx, dscale = _of_product(how, x, values, scale, x_scale, g)
  return dx, None, dscale, None if x_scale is None else jnp.zeros_like(x_scale), dbias


def _of_product(how, x, values, scale, x_scale, g):
  """The gradients of x and scale, from that of the product, float32."""
  values = _integers(how, values, x.shape[-1])
  group = how.group or x.shape[-1]
  rows = jnp.repeat(scale.astype(g.dtype), group, axis=-2)[..., :values.shape[-2], :]
  wide = values.astype(g.dtype)
  dx = jnp.matmul(g, jnp.swapaxes(wide * rows, -1, -2)).astype(x.dtype)
  codes, step = reference.quantize_rows(x, x_scale)
  rounded = (codes * step).astype(g.dtype)
  each = jnp.matmul(jnp.swapaxes(rounded, -1, -2), g) * wide                # [*E K N]
  dscale = _sum_of_groups(each, group)
  if scale.shape[-1] == 1:
    dscale = jnp.sum(dscale, axis=-1, keepdims=True)
  return dx, dscale.astype(scale.dtype)


def _summed_to(g, bias):
  """g [*E M N] summed over the axes that `bias`, of the same rank, does not have."""
  axes = [k for k, n in enumerate(bias.shape) if n == 1 and g.shape[k] != 1]
  return jnp.sum(g, axis=axes, keepdims=True).astype(bias.dtype)


def _logical(shape, layout):
  """(E, rows, N), whatever the layout; of 'panels' pieces of four rows."""
  if layout == 'panels':
    return shape[:-3], shape[-2], shape[-3] * layouts.PANEL
  return shape[:-2], *(shape[:-3:-1] if layout == 'columns' else shape[-2:])


def _sum_of_groups(x, group):
  """[..., I, O] as [..., G, O]."""
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % group), (0, 0)])
  *batch, I, O = x.shape
  return jnp.sum(x.reshape(*batch, I // group, group, O), axis=-2)


_product.defvjp(_forward, _backward)


def int8_grouped_matmul(x, values, scale, sizes, *, group=None, x_scale=None, layout='packed',
                        dtype=jnp.float32, implementation=None):
  """`int8_matmul` of each expert's rows with its own values and scales.

  Args:
    x: [M K], float; first the rows of expert 0, then those of expert 1, ...
    values: [E K N], or as layout says; as of `int8_matmul`.
    scale: [E G N] or [E G 1], float.
    sizes: [E], integer, rows of each expert; their sum is M.
    group: rows of values that share a scale; None is all of them, G = 1.
    x_scale: None, or [E], the step to which all rows of an expert are rounded.
    layout: as of `int8_matmul`.
    dtype: of the result; everything before it is float32.
    implementation: None is the fastest that the platform has for these operands; 'native' is a
      kernel on CPUs, 'pallas' one on TPUs with int8 units, 'xla' a product a group of rows of
      values.

  Returns:
    [M N], in dtype.

  Raises:
    ValueError: shapes or dtypes do not fit, or an implementation that is not there or does not run
      here.
  """
  if layout not in LAYOUTS or values.dtype not in LAYOUTS[layout]:
    raise ValueError(f'values are {values.dtype} of layout {layout!r}; expected one of {LAYOUTS}')
  batch, rows, N = _logical(values.shape, layout)
  K = x.shape[-1] if x.ndim else 0
  if x.ndim != 2 or sizes.ndim != 1 or sizes.shape != batch or rows != _rows_of(K, values, layout):
    raise ValueError(f'x {x.shape}, values {values.shape} and sizes {sizes.shape} do not fit; '
                     'expected [M K], [E K N] (as their layout has them) and [E]')
  (E,), G = batch, operands.groups(group, K)
  if scale.shape not in ((E, G, N), (E, G, 1)):
    raise ValueError(f'scale {scale.shape} does not fit values {values.shape}; expected '
                     f'{(E, G, N)}')
  operands.floats(x=x, scale=scale, x_scale=x_scale)
  operands.integers(sizes=sizes)
  _check_steps(x_scale, x, batch)
  scale = jnp.broadcast_to(scale, (E, G, N))
  how = How(implementation, group, layout, None, jnp.dtype(dtype).name)
  return _grouped(how, x, values, scale, sizes, x_scale)


def _rows(x, sizes, x_scale):
  if x_scale is None:
    return reference.quantize_rows(x)
  step = jnp.repeat(x_scale, sizes, total_repeat_length=x.shape[0])[:, None]
  codes, step = reference.quantize_rows(x[:, None], step[:, 0])
  return codes[:, 0], step[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(how, x, values, scale, sizes, x_scale):
  forms = [Form(functools.partial(_grouped_native, how), 'native', ('cpu',),
                cpu.why_not(x, values, scale, how.group or x.shape[-1], how.layout), local=True),
           Form(functools.partial(_grouped_pallas, how), 'pallas', ('tpu',),
                _why_not_grouped(how, x, values), local=True),
           Form(functools.partial(_grouped_xla, how), 'xla')]
  run = chosen('int8_grouped_matmul', forms, how.implementation)
  return run(x, values, scale, sizes, x_scale)


def _why_not_grouped(how, x, values):
  """None, or why the TPU kernel does not take these operands."""
  why = _why_no_kernel(how, x, values)
  if why is None and x.shape[1] > grouped.DEEPEST:
    why = f'takes matrices of up to {grouped.DEEPEST} rows, and these have {x.shape[1]}'
  return why


def _grouped_native(how, x, values, scale, sizes, x_scale):
  y = cpu.int8_matmul(x, values, scale, how.group or x.shape[-1], x_scale, sizes=sizes)
  return y.astype(how.dtype)


def _grouped_pallas(how, x, values, scale, sizes, x_scale):
  codes, row_scale = _rows(x, sizes, x_scale)
  from lean_jax.kernels.int8_matmul import tpu  # Pallas, where a TPU runs it
  return tpu.int8_grouped_matmul(codes, row_scale, values, scale, sizes, group=how.group,
                                 dtype=how.dtype)


def _grouped_xla(how, x, values, scale, sizes, x_scale):
  codes, row_scale = _rows(x, sizes, x_scale)
  values = _integers(how, values, x.shape[-1])
  total = 0.
  for k, span in _spans(how.group, values):
    part = grouped.grouped_matmul(codes[:, span], values[:, span], sizes)
    total = total + part.astype(jnp.float32) * _each_row(scale[:, k], sizes, codes)
  return (total * row_scale).astype(how.dtype)


def _grouped_forward(how, x, values, scale, sizes, x_scale):
  return _grouped(how, x, values, scale, sizes, x_scale), (x, values, scale, sizes, x_scale)


def _grouped_backward(how, saved, g):
  x, values, scale, sizes, x_scale = saved
  values, g = _integers(how, values, x.shape[-1]), g.astype(jnp.float32)
  transposed = lambda part: part.T.astype(g.dtype)
  codes, step = _rows(x, sizes, x_scale)
  rounded = (codes * step).astype(g.dtype)
  expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
  dx, dscale = [], []
  for k, span in _spans(how.group, values):
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
  rows = values.shape[1]
  return [(k, slice(start, start + (group or rows)))
          for k, start in enumerate(range(0, rows, group or rows))]


def _each_row(scale, sizes, x):
  """[M N], the scales [E N] of each row's expert."""
  return jnp.repeat(scale, sizes, axis=0, total_repeat_length=x.shape[0])
