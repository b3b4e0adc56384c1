"""Calls of the ops that have a TPU kernel, by the numbers of a request: to tune, and for tables.

A request with 'experts' is of grouped_matmul, whose op says as what a row and a matrix are
multiplied, and whose blocks are (rows, columns); weight_only_matmul of 16 bits is of floats.
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lean_jax.kernels.platforms import tuned

OPS = ('int8_matmul', 'weight_only_matmul')


class Call(NamedTuple):
  """One call of an op.

  Attributes:
    name: of the op and its kernel.
    run: the function of arrays of `shapes`.
    shapes: jax.ShapeDtypeStructs.
    steps: the function that gives the steps of the kernel's grid, under the device's mesh.
    operations: multiplications and additions.
    bytes: that a call reads and writes, each once.
    int8: whether they are multiplied on the int8 units.
    again: the function that gives how many times the units do the operations, under that mesh.
  """
  name: str
  run: Callable
  shapes: list
  steps: Callable
  operations: int
  bytes: int
  int8: bool
  again: Callable = lambda: 1


def call(request):
  """The Call of a request, a dict as `schedule.measure` takes it.

  Raises:
    ValueError: there is no such op, or it takes no weights of these bits.
  """
  op, M, K, N, group = (request[k] for k in ('op', 'm', 'k', 'n', 'group'))
  bits = request['bits']
  if op not in OPS:
    raise ValueError(f'no op {op!r}; there are: {", ".join(OPS)}')
  if bits not in ((2, 4, 8, 16) if request.get('experts') else (2, 4, 8)):
    raise ValueError(f'weights of {bits} bits; expected 2, 4 or 8')
  if request.get('experts'):
    return _grouped(request)
  stored = jnp.dtype(f'int{bits}')
  scale_dtype = jnp.float32 if op == 'int8_matmul' else jnp.bfloat16
  scale = jax.ShapeDtypeStruct((-(-K // group) if group else 1, N), scale_dtype)
  shapes = [jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((K, N), stored), scale]
  run = functools.partial(_RUNS[op], request, group)
  steps = lambda: _steps(op, request, stored, M, K, N, group)
  moved = (K * N * bits // 8 + scale.size * scale.dtype.itemsize
           + M * K * (1 if op == 'int8_matmul' else 2) + 2 * M * N)
  return Call(op, run, shapes, steps, 2 * M * K * N, moved, op == 'int8_matmul')


def _grouped(request):
  """The Call of a request with experts."""
  from lean_jax.kernels.grouped_matmul import api, tpu
  from lean_jax.kernels.int8_matmul import api as int8
  from lean_jax.kernels.int8_matmul import tpu as int8_tpu
  from lean_jax.kernels.int8_matmul.reference import quantize_rows
  from lean_jax.quantization.spec import QuantSpec
  op, M, K, N, group, E = (request[k] for k in ('op', 'm', 'k', 'n', 'group', 'experts'))
  bits = request['bits']
  stored = jnp.dtype(jnp.bfloat16 if bits == 16 else f'int{bits}')
  of = jax.ShapeDtypeStruct
  shapes = [of((M, K), jnp.bfloat16), of((E, K, N), stored),
            of((E, -(-K // group) if group else 1, N), jnp.bfloat16), of((E,), jnp.int32)]

  blocks = request.get('blocks')

  def weight_only(x, values, scale, sizes):
    if bits == 16 and blocks:
      return tpu.grouped_matmul(x, values, sizes, blocks=blocks)
    if bits == 16:
      return api.grouped_matmul(x, values, sizes, implementation=request.get('implementation'))
    spec = QuantSpec(bits, group)
    if blocks:
      return tpu.grouped_weight_only(x, values, scale, None, spec, sizes, blocks=blocks)
    return api.grouped_weight_only(x, values, scale, None, spec, sizes, layout='int4',
                                   implementation=request.get('implementation'))

  def int8_product(x, values, scale, sizes):
    if blocks:
      return int8_tpu.int8_grouped_matmul(*quantize_rows(x), values, scale, sizes, group=group,
                                          dtype=jnp.bfloat16, blocks=blocks)
    layout = 'packed' if values.dtype == jnp.int8 else 'int4'
    return int8.int8_grouped_matmul(x, values, scale, sizes, group=group, layout=layout,
                                    dtype=jnp.bfloat16,
                                    implementation=request.get('implementation'))

  def grid():
    """Rows of a tile, and how often tiles of rows and of columns are visited."""
    kind = 'grouped_matmul' if bits == 16 else op
    tile = blocks or tpu.tile(kind, stored, M, K, N, group, E)
    bm, bn, _ = tuned.fitted((*tile, K), M, K, N, group)
    return bm, -(-M // bm) + min(E, M) - 1, -(-N // bn)

  def again():
    bm, visits, _ = grid()
    return bm * visits / M
  steps = lambda: grid()[1] * grid()[2]
  G = shapes[2].shape[1]
  moved = (min(E, M) * (K * N * bits // 8 + 2 * G * N)
           + M * K * (1 if op == 'int8_matmul' else 2) + 2 * M * N)
  return Call('grouped_matmul', int8_product if op == 'int8_matmul' else weight_only, shapes,
              steps, 2 * M * K * N, moved, op == 'int8_matmul', again)


def _steps(op, request, dtype, M, K, N, group):
  tile = request.get('blocks') or tuned.blocks(op, dtype, M, K, N, group)
  bm, bn, bk = tuned.fitted(tile, M, K, N, group)
  return -(-M // bm) * -(-N // bn) * -(-K // bk)


def _int8(request, group, x, values, scale):
  from lean_jax.kernels.int8_matmul import api, tpu
  layout = 'packed' if values.dtype == jnp.int8 else 'int4'
  if request.get('blocks'):
    return tpu.int8_matmul(x, values, scale, group=group, blocks=tuple(request['blocks']),
                           dtype=jnp.bfloat16)
  return api.int8_matmul(x, values, scale, group=group, layout=layout, dtype=jnp.bfloat16,
                         implementation=request.get('implementation'))


def _weight_only(request, group, x, values, scale):
  from lean_jax.kernels.weight_only_matmul import api, tpu
  from lean_jax.quantization.spec import QuantSpec
  spec = QuantSpec(jnp.iinfo(values.dtype).bits, group)
  if request.get('blocks'):
    return tpu.weight_only_matmul(x, values, scale, None, spec, blocks=tuple(request['blocks']))
  return api.weight_only_matmul(x, values, scale, None, spec, layout='int4',
                                implementation=request.get('implementation'))


_RUNS = dict(int8_matmul=_int8, weight_only_matmul=_weight_only)
