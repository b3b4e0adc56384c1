"""LoRA: a trainable low-rank difference on a frozen weight."""
import math

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.weights import Dense, LowRank
from lean_jax.weights.base import positions


def lora(w, rank, alpha, *, key):
  """Adds alpha / rank * a @ b, a random and b zero, so that nothing changes at the start.

  Hu et al. 2021 (arXiv:2106.09685), section 4.1. Over a quantized weight this is QLoRA (Dettmers
  et al. 2023, arXiv:2305.14314). a is uniform within 1 / sqrt(inputs), as in the PEFT library.

  Args:
    w: a weight of any kind.
    rank: of the product, at most the lesser side of the matrix.
    alpha: the difference is scaled by alpha / rank.
    key: a jax PRNG key.

  Raises:
    InputError: rank out of range.
  """
  check_rank(w, rank)
  shape = w.shape
  side = lambda kinds: tuple(shape[k] for k in positions(w.dims, kinds))
  inputs = math.prod(side('i'))
  both = side('n') + side('e')
  bound = 1 / math.sqrt(inputs)
  a = jax.random.uniform(key, both + side('i') + (rank,), jnp.float32, -bound, bound)
  return LowRank(w, a, jnp.zeros(both + (rank,) + side('o')), alpha / rank)


def check_rank(w, rank):
  """Raises InputError if there is no product of this rank in the shape of w."""
  inputs, outputs = (math.prod(w.shape[k] for k in positions(w.dims, kind)) for kind in 'io')
  if not 1 <= rank <= min(inputs, outputs):
    raise InputError(f'LoRA rank {rank} is not within 1 and {min(inputs, outputs)}, the lesser '
                     f'side of a weight of shape {w.shape}')


def merge_lora(w):
  """The dense weight that an adapted one stands for; other kinds stay as they are."""
  return Dense(w.unbox(), w.dims, w.axes) if isinstance(w, LowRank) else w
