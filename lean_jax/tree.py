"""Parameters as a tree of named weights: rules, the parts that train, and sizes."""
import difflib
import math
import re

import jax

from lean_jax.errors import InputError
from lean_jax.weights import Weight
from lean_jax.weights.beside import is_beside


def is_weight(x):
  """Whether x is a weight: a leaf to the rules, though not to jax."""
  return isinstance(x, Weight)


def name(path):
  """A jax key path as 'layers/attention/q/kernel'."""
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def named_weights(params):
  """{name: weight} of all weights that the model multiplies by, in the tree's order."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
  return {name(path): w for path, w in leaves if is_weight(w) and not is_beside(w)}


def named_arrays(params):
  """{name: array} of all arrays, those inside weights included."""
  return {name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def transform(params, rules, *, stats=None, key=None):
  """Applies to each weight the first rule whose pattern matches its whole name.

  Args:
    params: a tree of weights and arrays.
    rules: [(regular expression, method or None)], in order; None leaves the weight as it is. A
      method is a function Weight -> Weight.
    stats: {name: statistics}, given to the methods as `stats=` if it is there.
    key: a jax PRNG key; each weight's method is given its own as `key=` if it is there.

  Returns:
    The tree with the methods applied.

  Raises:
    InputError: a pattern matches no weight that an earlier rule has left.
  """
  found = matched(params, rules)
  order = {n: k for k, n in enumerate(named_weights(params))}

  def one(here, w):
    extra = {} if stats is None else dict(stats=stats[here])
    if key is not None:
      extra['key'] = jax.random.fold_in(key, order[here])
    try:
      return found[here](w, **extra)
    except InputError as error:
      raise InputError(f'{here}: {error}') from error
  return with_weights(params, {here: one(here, w) for here, w in named_weights(params).items()
                           if here in found})


def with_weights(params, new):
  """The tree with other weights, {name: weight}, for those of these names.

  Where the old weight scaled its product's bias, as one of IA3 does, and the new one does not, the
  bias is the scaled one.
  """
  old = named_weights(params)
  kernels = {f'{here.rpartition("/")[0]}/bias': here for here in new}

  def one(path, x):
    here = name(path)
    if here not in kernels:
      return new.get(here, x)
    scaled = new[kernels[here]].bias(x) is not x
    return x if scaled else old[kernels[here]].bias(x).astype(x.dtype)
  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_weight)


def matched(params, rules):
  """{name: method} of each weight that the first rule for it gives one; raises as `transform`."""
  weights = list(named_weights(params))
  idle, found = [pattern for pattern, _ in rules], {}
  for here in weights:
    rule = next((r for r in rules if re.fullmatch(r[0], here)), None)
    if rule is None:
      continue
    pattern, method = rule
    if pattern in idle:
      idle.remove(pattern)
    if method is not None:
      found[here] = method
  if idle:
    raise InputError(f'rule {idle[0]!r} matches no weight that an earlier rule has left; '
                     f'{_nearest(idle[0], weights)}')
  return found


def split(params, pattern):
  """The arrays whose names match, and the others.

  Returns:
    (train, rest), each shaped as params, with None where the array is in the other.

  Raises:
    InputError: the pattern matches no array.
  """
  names = named_arrays(params)
  if not any(re.fullmatch(pattern, n) for n in names):
    raise InputError(f'trainable pattern {pattern!r} matches no array; '
                     f'{_nearest(pattern, list(names))}')
  hit = lambda path: re.fullmatch(pattern, name(path)) is not None
  at = jax.tree_util.tree_map_with_path
  return (at(lambda p, x: x if hit(p) else None, params),
          at(lambda p, x: None if hit(p) else x, params))


def merge(train, rest):
  """The inverse of `split`."""
  return jax.tree.map(lambda a, b: b if a is None else a, train, rest, is_leaf=lambda x: x is None)


def nbytes(params):
  """Bytes of all arrays, as stored."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def parameters(params):
  """The number of dense values that the tree stands for, adapters' own included."""
  def one(x):
    if not is_weight(x):
      return x.size
    dense, extra = math.prod(x.shape), 0
    while hasattr(x, 'base'):
      extra += sum(a.size for k, a in vars(x).items() if k != 'base' and hasattr(a, 'size'))
      x = x.base
    return dense + extra
  return sum(one(x) for x in jax.tree.leaves(params, is_leaf=is_weight))


def _nearest(pattern, names):
  plain = re.sub(r'[\\^$.*+?()\[\]{}|]+', '', pattern)
  near = difflib.get_close_matches(plain, names, n=5, cutoff=0.2) or names[:5]
  return f'near it: {", ".join(near)}'
