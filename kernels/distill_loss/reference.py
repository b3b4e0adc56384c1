"""The oracle of distill_loss: all logits, and what the losses are of them."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lean_jax.kernels.distill_loss.kinds import buckets


class Head(NamedTuple):
  """How hidden states become logits: softcap * tanh(scale * (h @ w) / softcap).

  Attributes:
    table: whether w is [V D], an embedding's table; else it is [D V].
    scale: of the product.
    softcap: None leaves it.
  """
  table: bool = False
  scale: float = 1.
  softcap: float | None = None


class Known(NamedTuple):
  """What is known of a teacher's distributions, in place of its logits.

  Attributes:
    ids: [T k], integer, tokens of each, no two alike.
    log_probs: [T k+1] of those and of all others together; [T k] where k is the vocabulary.
  """
  ids: Any
  log_probs: Any


class Plan(NamedTuple):
  """What is computed; hashable.

  Attributes:
    divergence: None, or the function of log q and log p, of `kinds`; options: its own, in pairs.
    student, teacher: Heads.
    chunk: tokens at a time; None leaves it to the implementation.
    axes: of the mesh, over which the tokens are.
  """
  divergence: Any
  options: tuple
  student: Head
  teacher: Head
  chunk: int | None
  axes: tuple


class Mix(NamedTuple):
  """What may differ from step to step of one program: scalars.

  Attributes:
    temperature: of both distributions.
    soft_weight: of the divergence; the cross-entropy has the rest.
  """
  temperature: Any
  soft_weight: Any


def product(h, w, head):
  """h [T D] times a head's w: [T V], in float32 at least."""
  return lax.dot_general(h, w.astype(h.dtype), (((1,), (1 if head.table else 0,)), ((), ())),
                         preferred_element_type=wide(h.dtype))


def logits(y, head):
  """What a head makes of its product y."""
  y = y if head.scale == 1 else y * head.scale
  return y if head.softcap is None else head.softcap * jnp.tanh(y / head.softcap)


def sums(plan, mix, zs, zt, labels, weights):
  """The weighted sums of the loss, and of its (soft, hard) parts, of products [T V] of the heads.

  A teacher that is Known has a temperature too: it is of the k + 1 probabilities, in both.

  The soft one is times temperature squared; a part that there is not is 0.
  """
  z = logits(zs, plan.student)
  soft = hard = jnp.zeros(z.shape[:1], z.dtype)
  if zt is not None:
    colder = 1 / mix.temperature                         # a product of each logit, no division
    distribution = lambda x: jax.nn.log_softmax(x * colder)
    if isinstance(zt, Known):
      one, other = buckets(jax.nn.log_softmax(z), zt.ids), zt.log_probs.astype(z.dtype)
    else:
      one, other = z, logits(zt, plan.teacher)
    soft = mix.temperature ** 2 * plan.divergence(
        distribution(one), distribution(other), **dict(plan.options))
  if labels is not None:
    hit = labels[:, None] == jnp.arange(z.shape[1])[None]              # no gather: no scatter back
    hard = jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(hit, z, 0), axis=-1)
  soft, hard = (jnp.sum(weights.astype(x.dtype) * x) for x in (soft, hard))
  return mix.soft_weight * soft + (1 - mix.soft_weight) * hard, (soft, hard)


def distill_loss(plan, mix, hs, ws, ht, wt, labels, weights):
  """As `api.distill_loss`, of weights whose sum is 1."""
  zt = target(plan, ht, wt)
  total, parts = sums(plan, mix, product(hs, ws, plan.student), zt, labels, weights)
  return total, *parts


def target(plan, ht, wt):
  """The product of the teacher's head, or what is Known of it; None without a teacher."""
  return ht if ht is None or isinstance(ht, Known) else product(ht, wt, plan.teacher)


def wide(dtype):
  """The dtype of sums."""
  return jnp.promote_types(dtype, jnp.float32)
