"""LoRA: a trainable low-rank difference on a frozen weight."""
import math

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.weights import LowRank
from lean_jax.weights.base import positions

SCALINGS = dict(standard=lambda rank: rank, rank_stabilised=math.sqrt)


def lora(w, rank, alpha, *, key, scaling='standard', dropout=0.):
  """Adds alpha / rank * a @ b, a random and b zero, so that nothing changes at the start.

  Hu et al. 2021 (arXiv:2106.09685), section 4.1. Over a quantized weight this is QLoRA (Dettmers
  et al. 2023, arXiv:2305.14314). a is uniform within 1 / sqrt(inputs), as in the PEFT library.

  Args:
    w: a weight of any kind.
    rank: of the product, at most the lesser side of the matrix.
    alpha: the difference is scaled by alpha / rank.
    key: a jax PRNG key.
    scaling: 'rank_stabilised' scales by alpha / sqrt(rank), so that a larger rank learns as fast
      (Kalajdzievski 2023, arXiv:2312.03732).
    dropout: the part of the inputs that a @ b does not see at a step of training.

  Raises:
    InputError: rank or dropout out of range, or no such scaling.
  """
  check_rank(w, rank)
  if scaling not in SCALINGS:
    raise InputError(f'no scaling {scaling!r}; there are: {", ".join(SCALINGS)}')
  if not 0 <= dropout < 1:
    raise InputError(f'dropout {dropout} is not at least 0 and less than 1')
  both, inputs, outputs = sides(w)
  bound = 1 / math.sqrt(math.prod(inputs))
  a = jax.random.uniform(key, both + inputs + (rank,), jnp.float32, -bound, bound)
  return LowRank(w, a, jnp.zeros(both + (rank,) + outputs), alpha / SCALINGS[scaling](rank),
                 float(dropout))


def sides(w):
  """The sizes of a weight's axes: [*n *e], [*i] and [*o], each a tuple."""
  shape = w.shape
  side = lambda kinds: tuple(shape[k] for k in positions(w.dims, kinds))
  return side('n') + side('e'), side('i'), side('o')


def check_rank(w, rank):
  """Raises InputError if there is no product of this rank in the shape of w."""
  _, inputs, outputs = sides(w)
  most = min(math.prod(inputs), math.prod(outputs))
  if not 1 <= rank <= most:
    raise InputError(f'LoRA rank {rank} is not within 1 and {most}, the lesser side of a weight of '
                     f'shape {w.shape}')


def factors(x, rank):
  """a [... I R] and b [... R O], whose product is the nearest to x [... I O] of that rank."""
  u, s, v = jnp.linalg.svd(x, full_matrices=False)
  root = jnp.sqrt(s[..., :rank])
  return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
