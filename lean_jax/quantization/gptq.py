"""GPTQ: rounds one input after the other, the later ones making up for the error of the earlier.

Frantar et al. 2022 (arXiv:2210.17323), sections 3.2 and 3.3. W is [I O] here, the paper's
transposed; H = X^T X of the inputs, U the upper triangle with U^T U = H^-1. In the order of the
inputs, row i of W is rounded, its error is divided by U[i, i], and every later row j loses U[i, j]
times that.
"""
import functools
import warnings

import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax.quantization import codes as grid
from lean_jax.quantization import formats
from lean_jax.quantization.clip import check_clip, least_error
from lean_jax.quantization.nested import nested
from lean_jax.quantization.ranges import static_step
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Quantized
from lean_jax.weights.base import to_matrix, unstacked
from lean_jax.weights.dense import check_dense

LEAST = 1e-6                  # of a damping that is raised
BLOCK = 128                   # inputs after which the rows beyond them are brought up to date
FEWEST = 16                   # inputs of an expert, below which it is rounded to nearest


def gptq(w, spec, stats, damping=.01, act_order=True, clip='absmax'):
  """The weight in the format `spec`, rounded so that its products are near what they were.

  Args:
    w: Dense, of one layer; each expert's matrix is treated by itself.
    spec: a QuantSpec or its name.
    stats: calibration.Statistics of its inputs, with `second`.
    damping: what is added to H's diagonal, in parts of its mean; ten times as much, and so on,
      where H cannot be inverted, with a warning.
    act_order: whether inputs go from the largest to the smallest (the authors' --act-order), within
      groups that stay where they are.
    clip: how a group's range is found: 'absmax', or 'mse', see `clip.least_error`.

  Inputs that were always zero keep rounded weights of zero, as the authors' do. An expert with
  fewer than `FEWEST` inputs is rounded to nearest.

  Raises:
    InputError: the weight is no float one, or an unknown scheme or clip.
  """
  spec = parse_spec(spec)
  check_clip(clip)
  check_dense(w, f'rounded to {spec} by gptq')
  value = meta.unbox(w)
  matrix = to_matrix(value, w.dims).astype(jnp.float32)
  codes, scale, zero, more = gptq_codes(matrix, stats.second, stats.rows, spec=spec,
                                        damping=float(damping), act_order=bool(act_order),
                                        clip=clip)
  if not isinstance(more, jax.core.Tracer) and (times := float(jnp.max(more))) > 1:
    warnings.warn(f'H is singular: damped {times:.0f} times as much', stacklevel=2)
  scale = nested(scale) if spec.double else scale
  return Quantized.from_codes(codes, scale, zero, spec, unstacked(value.shape, w.dims), value.dtype,
                              w.dims, w.axes, input_scale=static_step(spec, stats))


@functools.partial(jax.jit, static_argnames=('spec', 'damping', 'act_order', 'clip'))
def gptq_codes(w, H, rows, *, spec, damping=.01, act_order=True, clip='absmax'):
  """codes [*e I O], scale and zero [*e G O] of matrices [*e I O] whose inputs have H [*e I I]; and
  how many times the damping was taken, [*e].

  Args:
    rows: [*e], inputs that H is the sum of.
  """
  one = functools.partial(_codes, spec=spec, damping=damping, act_order=act_order, clip=clip)
  for _ in range(w.ndim - 2):
    one = jax.vmap(one)
  return one(w, H, rows)


def _codes(w, H, rows, *, spec, damping, act_order, clip):
  """`gptq_codes` of one matrix [I O]."""
  I, _ = w.shape
  few = rows < FEWEST
  H = jnp.where(few, jnp.eye(I), H)                    # with which nothing is made up for
  dead = jnp.diag(H) == 0
  w = jnp.where(dead[:, None], 0, w)
  H = H + jnp.diag(jnp.where(dead, jnp.mean(jnp.diag(H)), 0))
  order = jnp.argsort(-jnp.diag(H), stable=True) if act_order else jnp.arange(I)
  order = jnp.where(few, jnp.arange(I), order)
  scale, zero = _grids(w, spec, clip)                  # of groups as they stand: [G O]
  group = jnp.arange(I) // (spec.group or I)
  U, more = upper(H[order][:, order], damping)
  codes = _rounded(w[order], U, group[order], scale, zero, spec)
  return codes[jnp.argsort(order)], scale, zero, more


def _grids(w, spec, clip):
  split = formats.grouped(w, spec)
  shrink = least_error(split, spec, w.shape[0]) if clip == 'mse' else 1.
  return grid.fit(split, spec, w.shape[0], shrink)


def upper(H, damping):
  """U, upper, with U^T U = (H + damping)^-1, and how many times the damping that took.

  Where H = R R^T with R upper, U is R^-1; and R is the lower triangle of H read backwards.
  """
  mean = jnp.mean(jnp.diag(H))
  triangle = lambda damping: jnp.linalg.cholesky(
      (H + damping * mean * jnp.eye(H.shape[0]))[::-1, ::-1])[::-1, ::-1]
  R, more = triangle(damping), jnp.float32(1)
  for times in (10., 100., 1000., 10_000.):            # a singular H, damped until it is not
    R, more = jax.lax.cond(
        jnp.isfinite(R).all(), lambda R, more: (R, more),
        lambda R, more, times=times: (triangle(jnp.maximum(damping, LEAST) * times),
                                      jnp.float32(times)), R, more)
  return jax.scipy.linalg.solve_triangular(R, jnp.eye(H.shape[0], dtype=H.dtype)), more


def _rounded(w, U, group, scale, zero, spec):
  """Codes [I O] of rows in this order, `group` [I] naming each row's grid."""
  I, O = w.shape
  size = min(BLOCK, I)
  more = -I % size
  w = jnp.pad(w, ((0, more), (0, 0)))
  U = jnp.pad(U, ((0, more), (0, more))) + jnp.diag(jnp.where(jnp.arange(I + more) < I, 0., 1.))
  group = jnp.pad(group, (0, more))
  each = lambda v, k: None if v is None else v[k]

  def row(k, state, part, groups):
    rows, errors, codes = state
    own, pivot = rows[k], part[k]                      # [O], [size]
    s, z = each(scale, groups[k]), each(zero, groups[k])
    code = grid.encode(own, s, z, spec)
    error = (own - grid.decode(code, s, z, spec, jnp.float32)) / pivot[k]
    later = jnp.where(jnp.arange(size) > k, pivot, 0)
    return rows - later[:, None] * error[None], errors.at[k].set(error), codes.at[k].set(code)

  def block(b, state):
    w, codes = state
    at = b * size
    rows = jax.lax.dynamic_slice(w, (at, 0), (size, O))
    ahead = jax.lax.dynamic_slice(U, (at, 0), (size, I + more))
    part = jax.lax.dynamic_slice(ahead, (0, at), (size, size))
    groups = jax.lax.dynamic_slice(group, (at,), (size,))
    step = functools.partial(row, part=part, groups=groups)
    _, errors, own = jax.lax.fori_loop(
        0, size, step, (rows, jnp.zeros_like(rows), jnp.zeros((size, O), codes.dtype)))
    beyond = jnp.where((jnp.arange(I + more) >= at + size)[None], ahead, 0)
    return w - beyond.T @ errors, jax.lax.dynamic_update_slice(codes, own, (at, 0))
  kind = jax.eval_shape(lambda: grid.encode(w[0], each(scale, 0), each(zero, 0), spec)).dtype
  start = (w, jnp.zeros(w.shape, kind))
  return jax.lax.fori_loop(0, (I + more) // size, block, start)[1][:I]
