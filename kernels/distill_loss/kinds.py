"""Divergences between the next token's distributions of a student, q, and of a teacher, p.

Each takes log q and log p [T V], normalised, and gives [T], in nats. Gradients are those of log q.
"""
import math

import jax
import jax.numpy as jnp


def forward_kl(log_q, log_p):
  """KL(p || q): Hinton et al. 2015 (arXiv:1503.02531), section 2."""
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl(log_q, log_p):
  """KL(q || p): MiniLLM, Gu et al. 2023 (arXiv:2306.08543), section 2.1."""
  return forward_kl(log_p, log_q)


def jsd(log_q, log_p, *, beta):
  """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

  Agarwal et al. 2023 (GKD, arXiv:2306.13649), equation 1.
  """
  log_m = _mixed(log_p, log_q, beta)
  return beta * forward_kl(log_m, log_p) + (1 - beta) * forward_kl(log_m, log_q)


def skew_kl(log_q, log_p, *, alpha):
  """KL(p || alpha p + (1 - alpha) q): DistiLLM, Ko et al. 2024 (arXiv:2402.03898), section 3.1."""
  return forward_kl(_mixed(log_p, log_q, alpha), log_p)


def skew_reverse_kl(log_q, log_p, *, alpha):
  """KL(q || alpha q + (1 - alpha) p): the same paper and section."""
  return forward_kl(_mixed(log_q, log_p, alpha), log_q)


def total_variation(log_q, log_p):
  """Half the sum of |p - q|: Wen et al. 2023 (f-DISTILL, arXiv:2307.15190)."""
  return jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2


def top_k(log_q, log_p, *, k):
  """KL(p || q) of the teacher's k greatest entries, all others being one more."""
  _, at = jax.lax.top_k(log_p, k)                                            # [T k]
  return forward_kl(buckets(log_q, at), buckets(log_p, at))


def buckets(log_x, at):
  """Log-probabilities [T k+1] of the tokens at [T k], no two alike, and of all others together.

  Of all tokens there are no others, and it is [T k].
  """
  rows = jnp.arange(at.shape[0])[:, None]
  chosen = log_x[rows, at]
  if at.shape[1] == log_x.shape[1]:
    return chosen
  inside = jnp.zeros(log_x.shape, bool).at[rows, at].set(True)
  tail = jax.nn.logsumexp(jnp.where(inside, -jnp.inf, log_x), axis=-1, keepdims=True)
  return jnp.concatenate([chosen, tail], axis=-1)


# {name: (the function, {option: its value where none is given; None where it must be})}
KINDS = dict(
    forward_kl=(forward_kl, {}), reverse_kl=(reverse_kl, {}), jsd=(jsd, dict(beta=.5)),
    skew_kl=(skew_kl, dict(alpha=.1)), skew_reverse_kl=(skew_reverse_kl, dict(alpha=.1)),
    total_variation=(total_variation, {}), top_k=(top_k, dict(k=None)))


def divergence(kind, options, vocabulary):
  """The function of log q and log p that a name and its options stand for, and those options.

  Raises:
    ValueError: no such kind; an option that it does not have, or one out of range.
  """
  if kind not in KINDS:
    raise ValueError(f'kind {kind!r}; expected one of {", ".join(KINDS)}')
  f, own = KINDS[kind]
  if not set(options) <= set(own):
    raise ValueError(f'kind {kind!r} with {", ".join(options)}; it has '
                     f'{", ".join(own) or "no options"}')
  given = own | options
  for name in {'beta', 'alpha'} & set(given):
    if not 0 < given[name] < 1:
      raise ValueError(f'{name} {given[name]} of {kind!r}; expected more than 0 and less than 1')
  if 'k' in given and (not isinstance(given['k'], int) or not 0 < given['k'] < vocabulary):
    raise ValueError(f'k {given["k"]} of {kind!r} with a vocabulary of {vocabulary}; expected 1 to '
                     f'{vocabulary - 1}')
  return f, tuple(sorted(given.items()))


def _mixed(log_a, log_b, share):
  """log(share a + (1 - share) b)."""
  return jnp.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
