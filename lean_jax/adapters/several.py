"""Several LoRA adapters over one base, which is there once: switched, and mixed in a batch."""
import dataclasses

import jax
import jax.numpy as jnp

from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.weights import Adapter, LowRank, Several, bare


def together(adapted):
  """The tree of one base with the adapters of all, the first in use.

  A weight that one of them leaves alone has zeros for it, and lower ranks are filled up with zeros.

  Args:
    adapted: {name: params}, of LoRA over the very same base. Where params have several already,
      these come along by their own names.

  Raises:
    InputError: none are given, two of one name, other adapters than LoRA, or another base.
  """
  if not adapted:
    raise InputError('no adapters to put together; give {name: model}')
  each = [(name, part) for given, params in adapted.items()
          for name, part in _apart(given, params).items()]
  adapted = dict(each)
  if len(adapted) < len(each):
    twice = next(name for name in adapted if [n for n, _ in each].count(name) > 1)
    raise InputError(f'two adapters are named {twice!r}; give one of them another name')
  names, trees = tuple(adapted), list(adapted.values())
  for name, params in adapted.items():
    check_base(names[0], trees[0], name, params)

  def one(*ws):
    some = [w for w in ws if isinstance(w, Adapter)]
    if not some:
      return ws[0]
    if any(not isinstance(w, LowRank) or isinstance(w.base, Adapter) for w in some):
      raise InputError('adapters other than LoRA, or upon others, cannot be put together; merge '
                       'them')
    return _stacked(ws, names)
  return jax.tree.map(one, *trees, is_leaf=tree.is_weight)


def use(params, names):
  """The tree with another adapter in use: a name or None, the base alone; or one for each row.

  Raises:
    InputError: there is no such adapter, or there are not several.
  """
  names = [names] if names is None or isinstance(names, str) else list(names)
  found = [w for w in tree.named_weights(params).values() if isinstance(w, Several)]
  if not found:
    raise InputError('the model has no adapters to choose from; put some together first')
  odd = [n for n in names if n is not None and n not in found[0].adapters]
  if odd or not names:
    raise InputError(f'no adapter {odd[0] if odd else names!r}; there are: '
                     f'{", ".join(found[0].adapters)}')
  rows = jnp.asarray([-1 if n is None else found[0].adapters.index(n) for n in names], jnp.int32)

  def one(w):
    if not isinstance(w, Several):
      return w
    return dataclasses.replace(w, rows=jnp.broadcast_to(rows, w.rows.shape[:-1] + rows.shape))
  return jax.tree.map(one, params, is_leaf=tree.is_weight)


def _apart(name, params):
  """{name: params} of each adapter of a tree that has several; of another, itself."""
  found = [w for w in tree.named_weights(params).values() if isinstance(w, Several)]
  if not found:
    return {name: params}

  def only(k, w):
    if not isinstance(w, Several):
      return w
    at = w.dims.count('n')
    return LowRank(w.base, jnp.take(w.a, k, axis=at), jnp.take(w.b, k, axis=at), 1.)
  return {own: jax.tree.map(lambda w, k=k: only(k, w), params, is_leaf=tree.is_weight)
          for k, own in enumerate(found[0].adapters)}


def _stacked(ws, names):
  """The Several of LowRanks, or of their bare base, which some are."""
  some = [w for w in ws if isinstance(w, LowRank)]
  axis, R = ws[0].dims.count('n'), max(w.a.shape[-1] for w in some)
  at = some[0].b.ndim - 1 - sum(d == 'o' for d in some[0].dims)        # b's axis of ranks

  def filled(x, k):
    return jnp.pad(x, [(0, R - n if j == k else 0) for j, n in enumerate(x.shape)])
  a = [filled(w.a, w.a.ndim - 1) if isinstance(w, LowRank) else None for w in ws]
  b = [filled(w.b * w.scale, at) if isinstance(w, LowRank) else None for w in ws]
  stack = lambda xs: jnp.stack(
      [jnp.zeros_like(next(y for y in xs if y is not None)) if x is None else x for x in xs], axis)
  rows = jnp.zeros((*some[0].a.shape[:axis], 1), jnp.int32)
  return Several(some[0].base, stack(a), stack(b), rows, names)


def check_base(one, params, other, others):
  """Raises InputError where two trees, by their names, are not over the very same base."""
  base = lambda t: tree.named_arrays(jax.tree.map(bare, t, is_leaf=tree.is_weight))
  a, b = base(params), base(others)
  differ = [n for n in a | b if n not in a or n not in b or not (
      a[n] is b[n] or (a[n].dtype == b[n].dtype and bool(jnp.array_equal(a[n], b[n]))))]
  if differ:
    raise InputError(f'{one} and {other} are not over the same base, they differ in {differ[0]}; '
                     'attach or load both on one model')
