"""Distillation of encoders of texts for retrieval: on vectors, on similarities, on margins.

A bi-encoder makes one vector of each text and compares vectors; a cross-encoder reads both texts at
once and gives a score: better, and too slow to search with.
"""
import functools
import hashlib
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.data.padded import stacked
from lean_jax.data.rows import RowBatches
from lean_jax.distillation.hidden import hidden_cosine, hidden_mse
from lean_jax.distillation.losses import PROJECTIONS
from lean_jax.distillation.soft_labels import soft_labels
from lean_jax.errors import InputError
from lean_jax.evaluation.texts import vectors
from lean_jax.nn.pooling import unit

SIDES = ('query', 'positive', 'negative')
INPUTS = ('tokens', 'mask', 'token_types')


def vector_mse(student, teacher, projection=None):
  """MSE(student W, teacher), the mean over rows and the teacher's features.

  Reimers & Gurevych 2020 (arXiv:2004.09813), section 2.

  Args:
    student: [B D]; teacher: [B E].
    projection: W [D E]; None where E is D.
  """
  return hidden_mse(student[:, None], teacher[:, None], jnp.ones((len(student), 1)), projection)


def vector_cosine(student, teacher, projection=None):
  """1 - cos(student W, teacher), the mean over rows; args as `vector_mse` has them."""
  return hidden_cosine(student[:, None], teacher[:, None], jnp.ones((len(student), 1)), projection)


def similarity_kl(student, teacher, *, temperature=.05):
  """KL of which other row of the batch each row is like, teacher || student, in nats.

  Softmax of cosines by the temperature, a row's own left out, as contrastive training has them
  (van den Oord et al. 2018, arXiv:1807.03748, equation 4), the teacher's distribution in the place
  of one right answer. Widths may differ.

  Args:
    student: [B D]; teacher: [B E], 3 rows or more.
    temperature: > 0.
  """
  B = len(student)
  others = lambda x: jnp.where(jnp.eye(B, dtype=bool), -1e9, jnp.einsum(
      'bd,cd->bc', unit(x), unit(x)) / temperature)
  return soft_labels(others(student.astype(jnp.float32)), others(teacher.astype(jnp.float32)),
                     jnp.ones(B), temperature=1.)


def margin_mse(positive, negative, margin):
  """MSE of by how much the positive's score is above the negative's, the mean over rows.

  Hofstätter et al. 2020 (arXiv:2010.02666), equation 6. Args are [B]; margin is the teacher's.
  """
  return jnp.mean((positive - negative - jax.lax.stop_gradient(margin)) ** 2)


KINDS = dict(mse=vector_mse, cosine=vector_cosine, similarity_kl=similarity_kl)


def parsed(losses):
  """[(kind, weight, options)] of dicts: `kind`, of `KINDS`, `weight` (1), the kind's options.

  Raises:
    InputError: a kind or an option that there is not, two of a kind, or a number out of range.
  """
  out = []
  for given in losses:
    if not isinstance(given, dict) or given.get('kind') not in KINDS:
      raise InputError(f'a loss of vectors is {given!r}; expected a dict with kind: '
                       f'{", ".join(KINDS)}')
    given = dict(given)
    kind, weight = given.pop('kind'), given.pop('weight', 1.)
    own = [n for n, p in inspect.signature(KINDS[kind]).parameters.items()
           if p.kind == p.KEYWORD_ONLY]
    for name, value in dict(given, weight=weight).items():
      if name not in (*own, 'weight'):
        raise InputError(f'{kind} has no {name!r}; it has: {", ".join(["weight", *own])}')
      if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f'{name} {value!r} of {kind}; expected a number above 0')
    out.append((kind, weight, given))
  if not out or len({kind for kind, *_ in out}) < len(out):
    raise InputError(f'losses {losses!r}; expected one or more, each kind once')
  return out


def projection(losses, widths, seed):
  """{} or {'vectors': W [D E]}, where widths D and E differ and a loss compares vectors."""
  if widths[0] == widths[1] or all(kind == 'similarity_kl' for kind, *_ in losses):
    return {}
  return dict(vectors=jax.random.normal(jax.random.key(seed), widths) * widths[0] ** -.5)


@functools.lru_cache             # the same object for the same settings: its step is compiled once
def like_teacher(module, pooling, losses):
  """The loss (params, batch, key) of a student of vectors, of batches of `vector_batches`.

  Args:
    module: reads texts.
    pooling: a `nn.pooling.Pooling`.
    losses: JSON of a list for `parsed`.
  """
  terms = parsed(json.loads(losses))

  def loss(params, batch, key):
    del key
    y, target = _vectors(module, pooling, params, batch), batch['vectors']
    W, values = params.get(PROJECTIONS, {}).get('vectors'), {}
    for kind, _, options in terms:
      given = () if kind == 'similarity_kl' else (W,)
      values[kind] = KINDS[kind](y, target, *given, **options)
    return sum(weight * values[kind] for kind, weight, _ in terms), jax.lax.stop_gradient(values)
  return loss


@functools.lru_cache
def like_ranker(module, pooling):
  """The margin-MSE loss (params, batch, key) of a bi-encoder, of batches of `triple_batches`."""
  def loss(params, batch, key):
    del key
    q, p, n = (_vectors(module, pooling, params, batch, f'{side}_') for side in SIDES)
    scores = [jnp.einsum('bd,bd->b', q, x) for x in (p, n)]
    value = margin_mse(*scores, batch['margin'])
    ranked = jnp.mean((scores[0] > scores[1]) == (batch['margin'] > 0))
    return value, jax.lax.stop_gradient(dict(margin_mse=value, order=ranked))
  return loss


def vector_batches(rows, targets, *, batch, seed, context, by_length):
  """RowBatches of texts [(ids, types)] and the vectors that they should have, [n E]."""
  def make(which):
    return stacked([rows[k] for k in which], len(which), context) | dict(vectors=targets[which])
  return RowBatches(len(rows), batch, seed, make, _content(rows, targets),
                    np.array([len(ids) for ids, _ in rows]) if by_length else None)


def triple_batches(sides, margins, *, batch, seed, context):
  """RowBatches of queries, positives and negatives, each [(ids, types)], and margins [n]."""
  def make(which):
    out = dict(margin=margins[which])
    for side, rows in zip(SIDES, sides):
      given = stacked([rows[k] for k in which], len(which), context)
      out |= {f'{side}_{name}': x for name, x in given.items()}
    return out
  return RowBatches(len(margins), batch, seed, make,
                    _content([row for rows in sides for row in rows], margins))


def _content(rows, array):
  digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16)
  for ids, types in rows:
    digest.update(ids.tobytes() + b'|' + types.tobytes() + b'|')
  return digest.hexdigest()


def _vectors(module, pooling, params, batch, prefix=''):
  given = {name: batch[prefix + name] for name in INPUTS}
  return vectors(module, pooling.modes, pooling.normalize, params, given)
