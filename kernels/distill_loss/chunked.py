"""distill_loss in plain JAX: some tokens at a time, gradients and losses in one pass.

A chunk's logits give its part of the losses, and at once those of the gradients of the hidden
states and of the head: no logits are kept for a backward pass, or computed again. (Liger, Hsu et
al. 2024, arXiv:2410.10989, does so in kernels.)

A chunk has tokens of everywhere, token i of each of C runs: where a mesh's devices hold consecutive
tokens, each has its part of every chunk.
"""
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from lean_jax.kernels.distill_loss.reference import product, sums, target, wide


def gradients(plan, budget, wanted, mix, hs, ws, ht, wt, labels, weights):
  """The losses and the gradients of the first.

  Args:
    plan: a Plan.
    budget: bytes of a chunk's logits, where the plan leaves its size open.
    wanted: whether dhs, and whether dws, is computed.
    mix, hs, ws, ht, wt, labels, weights: as `reference.distill_loss`.

  Returns:
    (loss, soft, hard), dhs or None, dws or None.
  """
  narrow = ws.astype(hs.dtype)                       # once, and not once a chunk
  wt = None if wt is None else wt.astype(ht.dtype)
  parts, dhs, dws = _everywhere(plan, budget, wanted, mix, hs, narrow, ht, wt, labels, weights)
  return parts, dhs, None if dws is None else dws.astype(ws.dtype)


def chunk(T, V, budget, dtype=jnp.float32):
  """Tokens of a chunk of T, whose logits [C V] take up to `budget` bytes; at least 48 of them.

  Every chunk reads both heads, and reads and writes the gradient of one.
  """
  most = max(48, budget // (V * wide(dtype).itemsize))
  n = -(-T // most)
  return -(-T // n) if n == 1 else -(-T // (8 * n)) * 8                # a TPU's tiles have 8 rows


def _everywhere(plan, budget, wanted, mix, *arrays):
  """`_scanned` on each device's own tokens, where the plan says on which axes of a mesh they are.

  The head's gradient is then summed over devices once, not once a chunk.
  """
  if not plan.axes:
    return _scanned(plan, budget, wanted, mix, *arrays)
  mesh = jax.sharding.get_abstract_mesh()
  ways = functools.reduce(lambda n, axis: n * mesh.shape[axis], plan.axes, 1)
  hs, ws, ht, wt, labels, weights = arrays
  T = hs.shape[0]
  hs, ht, labels, weights = jax.tree.map(
      lambda x: _padded(x, -T % ways), (hs, ht, labels, weights))

  def local(mix, *arrays):
    parts, dhs, dws = _scanned(plan, budget, wanted, mix, *arrays)
    total = lambda x: None if x is None else lax.psum(x, plan.axes)
    return jax.tree.map(total, parts), dhs, total(dws)
  rows, whole = PartitionSpec(plan.axes), PartitionSpec()
  parts, dhs, dws = jax.shard_map(
      local, in_specs=(whole, rows, whole, rows, whole, rows, rows),
      out_specs=(whole, rows, whole), axis_names=set(plan.axes), check_vma=False)(
          mix, hs, ws, ht, wt, labels, weights)
  return parts, None if dhs is None else dhs[:T], dws


def _scanned(plan, budget, wanted, mix, hs, ws, ht, wt, labels, weights):
  T, V = hs.shape[0], ws.shape[0 if plan.student.table else 1]
  C = plan.chunk or chunk(T, V, budget, hs.dtype)
  n = -(-T // C)
  apart = lambda x: jnp.swapaxes(
      _padded(x, n * C - T).reshape(C, n, *x.shape[1:]), 0, 1)            # [n C ...]
  each = jax.tree.map(apart, (hs, ht, labels, weights))
  zero = jnp.zeros((), wide(hs.dtype))
  start = (zero, zero, zero), jnp.zeros(ws.shape, zero.dtype) if wanted[1] else None

  def step(carry, own):
    parts, dws = carry
    more, dhs, dw = _one(plan, wanted, mix, ws, wt, *own)
    return (jax.tree.map(jnp.add, parts, more), jax.tree.map(jnp.add, dws, dw)), dhs
  (parts, dws), dhs = lax.scan(step, start, each)
  if wanted[0]:
    dhs = jnp.swapaxes(dhs, 0, 1).reshape(n * C, -1)[:T]
  return parts, dhs, dws


def _one(plan, wanted, mix, ws, wt, hs, ht, labels, weights):
  """The losses of a chunk, [C D] of hidden states, and its parts of the gradients."""
  zt = target(plan, ht, wt)
  of = lambda zs: sums(plan, mix, zs, zt, labels, weights)
  zs = product(hs, ws, plan.student)
  if not any(wanted):
    total, parts = of(zs)
    return (total, *parts), None, None
  (total, parts), dz = jax.value_and_grad(of, has_aux=True)(zs)
  dz = dz.astype(hs.dtype)
  times = lambda a, b, i, j: lax.dot_general(a, b, (((i,), (j,)), ((), ())),
                                             preferred_element_type=zs.dtype)
  dhs = dws = None
  if wanted[0]:
    dhs = times(dz, ws, 1, 0 if plan.student.table else 1).astype(hs.dtype)
  if wanted[1]:
    dws = times(dz, hs, 0, 0) if plan.student.table else times(hs, dz, 0, 0)
  return (total, *parts), dhs, dws


def _padded(x, rows):
  """x with rows of zeros after its last one."""
  if not rows:
    return x
  return jnp.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))
