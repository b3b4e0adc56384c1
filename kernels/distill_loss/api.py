"""distill_loss: how far a student's next tokens are from a teacher's and from labels."""
import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lean_jax.kernels.distill_loss import chunked, reference
from lean_jax.kernels.distill_loss.kinds import divergence
from lean_jax.kernels.distill_loss.reference import Head, Known, Mix, Plan
from lean_jax.kernels.platforms.choice import Form, chosen

__all__ = ['Head', 'cross_entropy', 'distill_loss', 'known_loss']

# Bytes of a chunk's logits. A CPU's stay in its caches; elsewhere a chunk must be some hundreds of
# tokens, or reading the head and its gradient takes longer than multiplying.
BUDGETS = dict(cpu=6 * 2 ** 20, rest=128 * 2 ** 20)
PLAIN = Head()


def distill_loss(hs, ws, ht, wt, *, kind='forward_kl', temperature=1., labels=None,
                 soft_weight=1., weights=None, student=PLAIN, teacher=PLAIN, chunk=None, axes=(),
                 implementation=None, **options):
  """soft_weight * divergence + (1 - soft_weight) * cross-entropy, means over tokens, in nats.

  The divergence is between the distributions at a temperature, and times temperature squared
  (Hinton et al. 2015, arXiv:1503.02531, section 2). Gradients reach hs and ws, and are computed
  with the loss: a backward pass has nothing left to do. A call that is not differentiated computes
  none, and one that is, none of a head that is not trained.

  Args:
    hs, ws: [T D] and [D V], the student's hidden states and head; float.
    ht, wt: [T E] and [E V], the teacher's.
    kind: a name of `kinds.KINDS`: 'forward_kl', 'reverse_kl', 'jsd', 'skew_kl', 'skew_reverse_kl',
      'total_variation' or 'top_k'.
    temperature: > 0; 1 leaves the distributions as they are. It and soft_weight are numbers, or
      scalar arrays, which are not checked: one program then serves a schedule.
    labels: None, or [T], integer, 0 to V - 1; those without weight may be anything.
    soft_weight: 0 to 1; 1 without labels.
    weights: None, or [T], >= 0: of each token in the means, which are sums over
      max(sum of weights, 1). No gradient reaches them.
    student, teacher: Heads: how products with ws and wt are logits, and which axis is V.
    chunk: tokens whose logits are in memory at a time; None is as many as fit `BUDGETS`.
    axes: of the mesh that is set, over which the tokens are; each device then goes through its own.
    implementation: None or 'xla', in chunks; 'reference' has all logits in memory, for tests.
    **options: of the kind: beta of 'jsd' (.5), alpha of the skewed ones (.1), k of 'top_k'.

  Returns:
    loss, dict(soft=, hard=) of the parts, to which no gradient belongs; hard is 0 without labels.
    Float32; float64 of float64.

  Raises:
    ValueError: shapes, dtypes, options or an implementation that do not fit or are not there.
  """
  V = _vocabulary('student', hs, ws, student)
  other = _vocabulary('teacher', ht, wt, teacher)
  if other != V:
    raise ValueError(f'the student has a vocabulary of {V} and the teacher of {other}; a '
                     'divergence needs the same tokenizer in both')
  if ht.shape[0] != hs.shape[0]:
    raise ValueError(f'hidden states of {hs.shape[0]} tokens of the student and {ht.shape[0]} of '
                     'the teacher; expected the same tokens')
  _check_mix(temperature, soft_weight, labels)
  f, options = divergence(kind, options, V)
  plan = Plan(f, options, student, teacher, chunk, tuple(axes))
  ht, wt = jax.lax.stop_gradient((ht, wt))
  return _of(implementation, plan, Mix(temperature, soft_weight), hs, ws, ht, wt, labels, weights)


def known_loss(hs, ws, ids, log_probs, *, kind='forward_kl', temperature=1., labels=None,
               soft_weight=1., weights=None, student=PLAIN, chunk=None, axes=(),
               implementation=None, **options):
  """`distill_loss` of a teacher of whose distributions k tokens are known, all others being one.

  Divergences are between the k + 1 probabilities, which is less than between all of them; with
  k = V it is the same. The temperature is of the k + 1.

  Args:
    ids: [T k], integer, 0 to V - 1, no two of a row alike.
    log_probs: [T k+1], float, the teacher's at temperature 1: of these tokens and of all others
      together; [T V] where k = V.
    kind: as there, but 'top_k': that of k tokens is 'forward_kl' here.
    others: as there; so is what is returned, and raised.
  """
  V = _vocabulary('student', hs, ws, student)
  T, k = ids.shape
  if hs.shape[0] != T or not 0 < k <= V or log_probs.shape != (T, min(k + 1, V)):
    raise ValueError(f'ids {ids.shape} and log_probs {log_probs.shape} of {hs.shape[0]} tokens, '
                     f'vocabulary {V}; expected [T k] and [T k+1], or [T V] of all')
  if not jnp.issubdtype(ids.dtype, jnp.integer) or not jnp.issubdtype(log_probs.dtype,
                                                                      jnp.floating):
    raise ValueError(f'ids are {ids.dtype} and log_probs {log_probs.dtype}; expected integers and '
                     'floats')
  if kind == 'top_k':
    raise ValueError("kind 'top_k' of k tokens that are known; that is 'forward_kl' here")
  _check_mix(temperature, soft_weight, labels)
  f, options = divergence(kind, options, V)
  plan = Plan(f, options, student, PLAIN, chunk, tuple(axes))
  known = jax.lax.stop_gradient(Known(ids, log_probs))
  return _of(implementation, plan, Mix(temperature, soft_weight), hs, ws, known, None, labels,
             weights)


def cross_entropy(hs, ws, labels, *, weights=None, head=PLAIN, chunk=None, axes=(),
                  implementation=None):
  """The mean of -log p(label), in nats a token: `distill_loss` without a teacher.

  Args and what it raises are as there; returns the loss alone.
  """
  _vocabulary('student', hs, ws, head)
  plan = Plan(None, (), head, PLAIN, chunk, tuple(axes))
  return _of(implementation, plan, Mix(1., 0.), hs, ws, None, None, labels, weights)[0]


def forms(plan, T, V, dtype):
  """Its Forms: functions of (wanted, *arrays), as `chunked.gradients` has them."""
  sizes = {name: chunked.chunk(T, V, budget, dtype) for name, budget in BUDGETS.items()}
  run = {name: functools.partial(_chunked, plan, budget) for name, budget in BUDGETS.items()}
  out = [Form(run['rest'], 'xla'), Form(functools.partial(_reference, plan), 'reference')]
  if plan.chunk is None and sizes['cpu'] != sizes['rest']:
    out.insert(0, Form(run['cpu'], 'xla', ('cpu',)))
  return out


def _of(implementation, plan, mix, hs, ws, ht, wt, labels, weights):
  T = hs.shape[0]
  if plan.chunk is not None and plan.chunk < 1:
    raise ValueError(f'chunk {plan.chunk}; expected 1 token or more, or None')
  missing = [a for a in plan.axes if a not in jax.sharding.get_abstract_mesh().axis_names]
  if missing:
    raise ValueError(f'axes {", ".join(missing)} are not of the mesh; it has: '
                     f'{", ".join(jax.sharding.get_abstract_mesh().axis_names) or "none, set one"}')
  for name, x, kind in (('labels', labels, jnp.integer), ('weights', weights, None)):
    if x is not None and (x.shape != (T,) or (kind and not jnp.issubdtype(x.dtype, kind))):
      raise ValueError(f'{name} are {x.dtype} {x.shape}; expected one for each of {T} tokens'
                       + (', integers' if kind else ''))
  weights = jnp.ones(T) if weights is None else jax.lax.stop_gradient(weights)
  weights = weights.astype(reference.wide(hs.dtype))
  weights = weights / jnp.maximum(jnp.sum(weights), 1)
  mix = jax.lax.stop_gradient(Mix(*(jnp.asarray(x, weights.dtype) for x in mix)))
  loss, soft, hard = _loss(implementation, plan, mix, hs, ws, ht, wt, labels, weights)
  return loss, jax.lax.stop_gradient(dict(soft=soft, hard=hard))


def _check_mix(temperature, soft_weight, labels):
  fixed = lambda x: not isinstance(x, jax.Array)
  if fixed(temperature) and not temperature > 0:
    raise ValueError(f'temperature {temperature} is not positive; 1 to 4 are usual')
  if (fixed(soft_weight) and not 0 <= soft_weight <= 1) or (
      labels is None and (not fixed(soft_weight) or soft_weight != 1)):
    raise ValueError(f'soft_weight {soft_weight} {"without" if labels is None else "with"} labels; '
                     'expected 0 to 1, and 1 where there are none')


def _vocabulary(whose, h, w, head):
  if h.ndim != 2 or w.ndim != 2 or h.shape[1] != w.shape[1 if head.table else 0]:
    raise ValueError(f"the {whose}'s hidden states {h.shape} and head {w.shape} do not fit; "
                     f'expected [T D] and {"[V D]" if head.table else "[D V]"}')
  if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (h, w)):
    raise ValueError(f"the {whose}'s hidden states are {h.dtype} and its head {w.dtype}; expected "
                     'floats')
  if head.softcap is not None and not head.softcap > 0:
    raise ValueError(f"the {whose}'s softcap is {head.softcap}; expected a positive one, or None")
  return w.shape[0 if head.table else 1]


def _chunked(plan, budget, wanted, *arrays):
  return chunked.gradients(plan, budget, wanted, *arrays)


def _reference(plan, wanted, mix, hs, ws, *rest):
  of = lambda hs, ws: reference.distill_loss(plan, mix, hs, ws, *rest)
  parts, pull = jax.vjp(of, hs, ws)
  one, zero = jnp.ones_like(parts[0]), jnp.zeros_like(parts[0])
  dhs, dws = pull((one, zero, zero)) if any(wanted) else (None, None)
  return parts, dhs if wanted[0] else None, dws if wanted[1] else None


def _run(implementation, plan, wanted, mix, hs, ws, *rest):
  V = ws.shape[0 if plan.student.table else 1]
  each = [f._replace(run=functools.partial(f.run, wanted))
          for f in forms(plan, hs.shape[0], V, hs.dtype)]
  return chosen('distill_loss', each, implementation)(mix, hs, ws, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(implementation, plan, mix, hs, ws, ht, wt, labels, weights):
  return _run(implementation, plan, (False, False), mix, hs, ws, ht, wt, labels, weights)[0]


def _forward(implementation, plan, *given):
  arrays = jax.tree.map(lambda x: x.value, given)
  wanted = given[1].perturbed, given[2].perturbed
  parts, *grads = _run(implementation, plan, wanted, *arrays)
  return parts, grads


def _backward(implementation, plan, grads, cotangents):
  g = cotangents[0]                            # the parts' own are zeros: see `_of`
  if isinstance(g, SymbolicZero):
    return (None,) * 7
  scaled = lambda x: None if x is None else (x * g).astype(x.dtype)
  return None, *map(scaled, grads), None, None, None, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)
