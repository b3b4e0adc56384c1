"""PiSSA: an adapter that begins as the weight's principal part, over what is left of it."""
import dataclasses

import jax.numpy as jnp

from lean_jax.adapters.lora import check_rank, factors, sides
from lean_jax.quantization.rtn import rtn
from lean_jax.weights import LowRank
from lean_jax.weights.base import from_matrix, to_matrix, unstacked
from lean_jax.weights.dense import check_dense


def pissa(w, rank, spec=None):
  """LowRank of the largest singular values over Dense of the others: together w.

  Meng et al. 2024 (arXiv:2404.02948), equations 2 to 4. With a scheme the rest is rounded: QPiSSA
  (section 4). The adapter counts as it is (alpha = rank).

  Args:
    w: Dense.
    rank: of the adapter, at most the lesser side of the matrix.
    spec: a QuantSpec or its name; None rounds nothing.

  Raises:
    InputError: the weight is no float one, rank out of range, or a scheme that `rtn` refuses.
  """
  check_dense(w, 'cut by pissa')
  check_rank(w, rank)
  matrix = to_matrix(w.value, w.dims).astype(jnp.float32)
  a, b = factors(matrix, rank)
  rest = from_matrix(matrix - a @ b, w.dims, unstacked(w.shape, w.dims)).astype(w.value.dtype)
  base = dataclasses.replace(w, value=rest)
  both, inputs, outputs = sides(w)
  return LowRank(base if spec is None else rtn(base, spec), a.reshape(*both, *inputs, rank),
                 b.reshape(*both, rank, *outputs), 1.)
