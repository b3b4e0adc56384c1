"""The router of a mixture of experts, in float32: which experts a token uses, and how much."""
import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

SCORES = dict(
    softmax=jax.nn.softmax,
    sigmoid=jax.nn.sigmoid,
    logits=lambda logits: logits)


@dataclasses.dataclass(frozen=True)
class RouterOptions:
  """How experts are chosen and weighed.

  Attributes:
    top_k: how many a token uses.
    scores: what the best of are taken: 'softmax' or 'sigmoid' of the logits, or the 'logits'
      themselves, whose softmax over the chosen ones is then their weight.
    normalise: whether the weights of the chosen are divided by their sum.
    scale: what they are multiplied by in the end.
    bias: whether the logits have one.
    correction: whether there is a bias for the choice that the weights do not have; not a gradient
      but whoever balances the experts sets it (Wang et al. 2024, arXiv:2408.15664).
    groups, top_groups: experts stand in groups, and are taken from the best ones, those whose two
      best experts have the greatest sum (arXiv:2412.19437, section 2.1.2); 1 and 1 is no groups.
    balance: coefficient of the load-balancing loss of Switch (Fedus et al. 2022, arXiv:2101.03961,
      equations 4 to 6), as transformers has it for several choices.
    z: coefficient of the router z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5).
  """
  top_k: int = 2
  scores: str = 'softmax'
  normalise: bool = True
  scale: float = 1.
  bias: bool = False
  correction: bool = False
  groups: int = 1
  top_groups: int = 1
  balance: float = 0.
  z: float = 0.


class Router(nn.Module):
  """The experts of each token and their weights. Its losses are means over tokens and layers.

  The kernel is no `Weight`: methods that round or adapt those leave the choice of experts alone.
  """
  options: RouterOptions
  experts: int
  layers: int = 1               # that have a router: each one's loss counts for its part

  @nn.compact
  def __call__(self, x, mask=None):
    """x [M D], mask [M] bool or None; gives chosen [M k], int32, and their weights, float32."""
    o, D = self.options, x.shape[1]
    array = lambda name, init, *shape: self.param(name, init, shape).astype(jnp.float32)
    fan_in = nn.initializers.variance_scaling(1., 'fan_in', 'normal')
    kernel = array('kernel', fan_in, D, self.experts)
    # A TPU's own precision for float32 is that of bfloat16.
    logits = jnp.matmul(x.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
    zeros = nn.initializers.zeros
    if o.bias:
      logits = logits + array('bias', zeros, self.experts)[None]
    correction = array('correction', zeros, self.experts) if o.correction else None
    self.sow('taps', 'logits', logits)
    chosen, share = choices(logits, o, correction)
    if o.balance:
      self.sow('losses', 'balance', o.balance / self.layers * balance_loss(
          logits, chosen, o.scores, mask))
    if o.z:
      self.sow('losses', 'z', o.z / self.layers * z_loss(logits, mask))
    return chosen, share


def choices(logits, options, correction=None):
  """The experts of each token, best first, and their weights: [M k] each, of logits [M E]."""
  o = options
  scores = SCORES[o.scores](logits)
  wanted = scores if correction is None else scores + correction[None]
  if o.groups > 1:
    wanted = jnp.where(of_best_groups(wanted, o.groups, o.top_groups), wanted, -jnp.inf)
  _, chosen = jax.lax.top_k(jax.lax.stop_gradient(wanted), o.top_k)
  share = jnp.take_along_axis(scores, chosen, axis=1)
  if o.scores == 'logits':
    share = jax.nn.softmax(share)
  if o.normalise:
    share = share / (jnp.sum(share, axis=1, keepdims=True) + 1e-20)
  return chosen, share * o.scale


def of_best_groups(scores, groups, top_groups):
  """Whether each score [M E] is in one of the groups whose two best have the greatest sums."""
  M, E = scores.shape
  best, _ = jax.lax.top_k(scores.reshape(M, groups, E // groups), 2)
  _, top = jax.lax.top_k(jnp.sum(best, axis=-1), top_groups)                       # [M top_groups]
  kept = jnp.any(top[:, :, None] == jnp.arange(groups)[None, None], axis=1)        # [M groups]
  return jnp.repeat(kept, E // groups, axis=1)


def balance_loss(logits, chosen, scores, mask=None):
  """E * sum over experts of (choices of it a token) * (its mean probability); k if even.

  Sigmoid scores are made probabilities by their sum, as in arXiv:2412.19437, section 2.1.2.
  """
  E = logits.shape[1]
  probs = jax.nn.sigmoid(logits) if scores == 'sigmoid' else jax.nn.softmax(logits)
  probs = probs / jnp.sum(probs, axis=1, keepdims=True)
  counts = jnp.sum(jax.nn.one_hot(chosen, E), axis=1)                              # [M E]
  return E * jnp.sum(mean(counts, mask) * mean(probs, mask))


def z_loss(logits, mask=None):
  """The mean of the squared log of the logits' partition function."""
  return mean(jax.nn.logsumexp(logits, axis=1) ** 2, mask)


def mean(x, mask):
  """Over the first axis, where the mask [M] is True."""
  if mask is None:
    return jnp.mean(x, axis=0)
  kept = mask.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.sum(x * kept, axis=0) / jnp.maximum(jnp.sum(mask.astype(x.dtype)), 1)
