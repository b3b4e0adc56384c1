"""Which weight gets how many bits: a scheme for each, the loss least within a number of bytes.

The problem is that of HAWQ-V3 (Yao et al. 2020, arXiv:2011.10680): the sum of what each weight
costs alone stands for what they cost together. There a Hessian estimates these costs; here one
weight after the other is rounded, and the loss of the float model's own predictions measured: the
KL divergence from them. The loss of the text itself also falls where a rounding happens to go with
its gradient, which a choice would take for a gain (`experiments/mixed_bits.py` has the figures).
"""
import re

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import tree
from lean_jax.distillation.soft_labels import soft_labels
from lean_jax.errors import InputError
from lean_jax.objectives.forward import forward
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense

SCHEMES = ('w2a16-g64', 'w3a16-g64', 'w4a16-g64', 'w8a16-g64')
STATES = 2 ** 16              # partial choices that are kept: up to so many, the choice is exact


def sensitivities(module, params, tokens, schemes, where):
  """What each weight costs in each scheme.

  Schemes of 16-bit activations share one program; of 8-bit ones, each weight and scheme has its
  own. Layers that are stacked are one weight.

  Args:
    module: a decoder.
    params: its parameters, floats where `where` matches.
    tokens: [B T] integers, one batch: the more, the surer.
    schemes: names of schemes.
    where: a regular expression on the weights' whole names.

  Returns:
    {name: {scheme: nats a token}}, {name: {scheme: bytes}}.

  Raises:
    InputError: no weight matches or one is no float weight, an unknown scheme, or a group larger
      than a weight.
  """
  names = matched(params, where)
  specs = {str(s): parse_spec(s) for s in schemes}
  outputs = lambda params: forward(module, params, dict(tokens=tokens))[0]
  mask, target = jnp.ones(tokens.shape), jax.jit(outputs)(params)
  cost = jax.jit(lambda params, target: soft_labels(outputs(params), target, mask, temperature=1.))
  stored, value = jax.jit(rtn, static_argnums=1), jax.jit(lambda w: w.unbox())
  costs, sizes, weights = {}, {}, tree.named_weights(params)
  for name in names:
    costs[name], sizes[name], w = {}, {}, weights[name]
    for scheme, spec in specs.items():
      one = stored(w, spec)
      sizes[name][scheme] = tree.nbytes(one)
      if spec.activation_bits is None:                 # of the same kind, so of the same program
        one = Dense(value(one), w.dims, w.axes)
      changed = tree.transform(params, [(re.escape(name), lambda _, one=one: one)])
      costs[name][scheme] = float(cost(changed, target))
  return costs, sizes


def allocate_bits(sensitivity, sizes, budget):
  """The scheme of each weight with which the sum of their losses is least within the budget.

  A knapsack of one choice a weight: weight by weight, of all choices so far those are kept that no
  other beats in both bytes and loss. Exact while these are at most `STATES`; beyond, of the choices
  within each of `STATES` equal parts of the budget the one of least loss is kept, and what is left
  unused of the budget for it is at most a part for each weight.

  Args:
    sensitivity: {name: {scheme: loss}}.
    sizes: {name: {scheme: bytes}}, of the same names and schemes.
    budget: bytes.

  Returns:
    {name: scheme}.

  Raises:
    InputError: the least that the schemes take is more than the budget.
  """
  names = list(sensitivity)
  least = [min(sizes[n].values()) for n in names]
  if sum(least) > budget:
    raise InputError(f'a budget of {int(budget):,} bytes, and the smallest schemes take '
                     f'{sum(least):,}; give that at least, or schemes of fewer bits')
  used, lost = np.zeros(1, np.int64), np.zeros(1)      # of the choices kept, in order of bytes
  steps = []
  for k, name in enumerate(names):
    schemes = list(sensitivity[name])
    size = np.array([sizes[name][s] for s in schemes], np.int64)
    loss = np.array([sensitivity[name][s] for s in schemes], np.float64)
    used, lost = (used[:, None] + size).reshape(-1), (lost[:, None] + loss).reshape(-1)
    room = budget - sum(least[k + 1:])
    kept = _undominated(used, lost, room)
    steps.append((schemes, kept.astype(np.int32)))
    used, lost = used[kept], lost[kept]
  at, out = int(np.argmin(lost)), {}
  for name, (schemes, kept) in zip(reversed(names), reversed(steps)):
    at, choice = divmod(int(kept[at]), len(schemes))
    out[name] = schemes[choice]
  return {name: out[name] for name in names}


def budget_bytes(budget, params, names):
  """Bytes of a budget: a number of them, or '3.2 bits' for each parameter of the named weights.

  Raises:
    InputError: it is neither.
  """
  if isinstance(budget, (int, float)) and not isinstance(budget, bool) and budget > 0:
    return int(budget)
  match = re.fullmatch(r'(\d+(?:\.\d+)?) bits', str(budget))
  if not match or not float(match[1]):
    raise InputError(f"budget {budget!r}; give bytes, or bits a parameter like '3.2 bits'")
  weights = tree.named_weights(params)
  return int(float(match[1]) / 8 * sum(int(np.prod(weights[n].shape)) for n in names))


def matched(params, where):
  """The names of the float weights that a pattern matches.

  Raises:
    InputError: there is none, or one is no float weight.
  """
  weights = tree.named_weights(params)
  tree.transform(weights, [(where, None)])             # which raises where nothing matches
  found = {n: w for n, w in weights.items() if re.fullmatch(where, n)}
  for name, w in found.items():
    if not isinstance(w, Dense):
      raise InputError(f'{name} is a {type(w).__name__} weight; choose bits for the float model')
  return list(found)


def _undominated(used, lost, room):
  """Indices of what fits in `room` and loses less than all that is smaller, in order of bytes."""
  order = np.lexsort((lost, used))
  order = order[used[order] <= room]
  before = np.concatenate([[np.inf], np.minimum.accumulate(lost[order])[:-1]])
  order = order[lost[order] < before]
  if len(order) > STATES:
    part = (used[order] * STATES // (room + 1)).astype(np.int64)
    order = order[np.append(part[1:] != part[:-1], True)]              # the last loses least
  return order
