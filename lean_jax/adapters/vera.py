"""VeRA: random matrices that all weights share, and two trained vectors for each weight."""
import functools
import math

import jax
import jax.numpy as jnp

from lean_jax.adapters.lora import check_rank, sides
from lean_jax.errors import InputError
from lean_jax.weights import Vectors


def vera(w, rank, inputs, seed=0, start=.1):
  """Adds A diag(d) B diag(b), b zero, so that nothing changes at the start; only d and b train.

  Kopiczko et al. 2023 (arXiv:2310.11454), section 3. Kaiming's uniform A and B follow from the seed
  alone: a smaller weight's are the first rows and columns of a larger one's.

  Args:
    w: a weight of any kind.
    rank: of A and B, at most the lesser side of the matrix.
    inputs: rows of the shared A: the inputs of the widest weight that shares it.
    seed: of A and B.
    start: of d.

  Raises:
    InputError: rank out of range, or w has more inputs.
  """
  check_rank(w, rank)
  both, own, outputs = sides(w)
  I, O = math.prod(own), math.prod(outputs)
  if inputs < I:
    raise InputError(f'a weight of shape {w.shape} has {I} inputs, more than the {inputs} of the '
                     'shared matrix; give those of the widest weight')
  to_a, to_b = jax.random.split(jax.random.key(seed))
  a = _rows(to_a, I, rank, math.sqrt(6 / inputs))                      # [I R]
  b = _rows(to_b, O, rank, math.sqrt(6 / rank)).T                      # [R O]
  each = lambda x, shape: jnp.broadcast_to(x.reshape(shape), both + shape)
  return Vectors(w, each(a, (*own, rank)), each(b, (rank, *outputs)),
                 jnp.full((*both, rank), start, jnp.float32), jnp.zeros(both + outputs))


def _rows(key, count, rank, bound):
  """[count rank], uniform within the bound; a row follows from its number."""
  draw = functools.partial(jax.random.uniform, shape=(rank,), minval=-bound, maxval=bound)
  return jax.vmap(lambda k: draw(jax.random.fold_in(key, k)))(jnp.arange(count))
