"""LoftQ: a rounded weight and a low-rank adapter that begins with what the rounding lost.

Li et al. 2023 (arXiv:2310.08659), algorithm 1: Q is the rounding of W - A B, then A B the best
product of rank R for W - Q, again and again. With one step Q is QLoRA's, and only the adapter's
start differs.
"""
import jax
import jax.numpy as jnp
from flax.core import meta

from lean_jax.adapters.lora import check_rank, factors, sides
from lean_jax.errors import InputError
from lean_jax.quantization import formats
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import LowRank, Quantized
from lean_jax.weights.base import to_matrix, unstacked
from lean_jax.weights.dense import check_dense


def loftq(w, spec, rank, steps=5):
  """LowRank over Quantized, together near w; the adapter counts as it is (alpha = rank).

  Stacked layers and experts are matrices of their own.

  Args:
    w: Dense.
    spec: a QuantSpec or its name.
    rank: of the adapter, at most the lesser side of the matrix.
    steps: T, how often both are found; the authors use 5 and gain most with the first.

  Raises:
    InputError: the weight is no float one, the rank or steps are out of range, an unknown scheme
      or one with calibrated activations.
  """
  spec = parse_spec(spec)
  check_dense(w, f'rounded to {spec} by loftq')
  if spec.static:
    raise InputError(f'{spec} needs a range of activations, which loftq does not find; give w8a8')
  if steps < 1:
    raise InputError(f'{steps} steps of loftq; give at least 1')
  check_rank(w, rank)
  value = meta.unbox(w)
  matrix = to_matrix(value, w.dims).astype(jnp.float32)
  a, b, codes, scale, zero = _alternated(matrix, spec, rank, steps)
  base = Quantized.from_codes(codes, scale, zero, spec, unstacked(value.shape, w.dims), value.dtype,
                              w.dims, w.axes)
  both, inputs, outputs = sides(w)
  return LowRank(base, a.reshape(*both, *inputs, rank), b.reshape(*both, rank, *outputs), 1.)


def _alternated(matrix, spec, rank, steps):
  """a [*n *e I R], b [*n *e R O], and the codes, scales and zeros of a matrix [*n *e I O]."""
  def step(_, state):
    a, b, *_ = state
    codes, scale, zero = formats.quantize(matrix - a @ b, spec)
    lost = matrix - formats.dequantize(codes, scale, zero, spec, jnp.float32)
    return *factors(lost, rank), codes, scale, zero
  *batch, I, O = matrix.shape
  start = (jnp.zeros((*batch, I, rank)), jnp.zeros((*batch, rank, O)))
  found = jax.eval_shape(lambda: formats.quantize(matrix, spec))
  start += jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
  return jax.lax.fori_loop(0, steps, step, start)
