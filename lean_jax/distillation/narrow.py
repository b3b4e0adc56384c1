"""A model cut from a greater one: some of its heads, hidden units, channels."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import tree
from lean_jax.distillation.importance import block_influence, check_one_stack, importance
from lean_jax.distillation.start import take_layers
from lean_jax.errors import InputError
from lean_jax.interop.hf import abstract, shapes
from lean_jax.models.segments import configured, converted
from lean_jax.weights import Dense


def narrowed(config, params, found, *, heads=None, groups=None, hidden=None, width=None):
  """The model with the most important heads, hidden units and channels kept, in their order.

  Each layer keeps its own heads and hidden units; channels are the same in all. Query heads go with
  the keys and values that they share: groups are chosen by the sum of their heads' scores, then
  within each group as many heads.

  Args:
    config, params: of a decoder or an encoder, its weights float.
    found: an `importance.Importance` of it.
    heads, groups, hidden, width: how many are kept, as StackConfig has them; None keeps all (heads
      then follow the groups).

  Returns:
    config, params.

  Raises:
    InputError: a number out of range, parts that this model's layers do not have or cannot lose, or
      weights that are not floats.
  """
  odd = [n for n, w in tree.named_weights(params).items() if not isinstance(w, Dense)]
  if odd:
    raise InputError(f'{odd[0]} is not a matrix of floats; cut the model first, and round or adapt '
                     'it then')
  scanned = config.scan_layers
  config, params = converted(config, params, False)
  if hidden is not None:
    _check_all('hidden units', [x is not None for x in found.hidden], 'an MLP')
    _check('hidden', hidden, config.hidden)
    keep = [best(x, hidden) for x in found.hidden]
    config, params = _cut(config, params, dict(hidden=hidden),
                          lambda name, layer: {config.hidden: keep[layer]})
  if heads is not None or groups is not None:
    config, params = _cut_heads(config, params, found, heads, groups)
  if width is not None:
    _check('width', width, config.width)
    keep_channels = best(found.channels, width)
    config, params = _cut(config, params, dict(width=width),
                          lambda name, layer: {config.width: keep_channels})
  return converted(config, params, scanned)


def cut(config, params, batches, layers, wide):
  """The model with the layers of most influence on batches, and `narrowed` by what they show.

  Args:
    layers: how many; None for all.
    wide: settings of `narrowed`.
  """
  keep = None
  check_one_stack(config)
  if layers is not None:
    _check('layers', layers, config.layers)
    keep = best(block_influence(config, params, batches), layers)
  found = importance(config, params, batches) if wide else None
  if keep is not None:
    config, params = take_layers(config, params, [int(k) for k in keep])
    found = found and found._replace(heads=[found.heads[k] for k in keep],
                                     hidden=[found.hidden[k] for k in keep])
  return narrowed(config, params, found, **wide) if wide else (config, params)


def best(scores, count):
  """The places of the greatest scores, in order."""
  return np.sort(np.argsort(-np.asarray(scores), kind='stable')[:count])


def _cut_heads(config, params, found, heads, groups):
  H, G, K = config.heads, config.groups, config.head_width
  R = H // G
  _check_all('heads', [x is not None for x in found.heads], 'attention')
  groups = G if groups is None else groups
  _check('groups', groups, G)
  heads = groups * R if heads is None else heads
  _check('heads', heads, H)
  if heads % groups or heads // groups > R:
    raise InputError(f'heads {heads} in {groups} groups, of {H} in {G}; give a multiple of the '
                     f'groups, {R} heads in each at most')

  def chosen(scores):
    scores = np.asarray(scores).reshape(G, R)
    kept = best(scores.sum(axis=1), groups)
    return kept, np.concatenate([g * R + best(scores[g], heads // groups) for g in kept])
  wide = lambda at: (at[:, None] * K + np.arange(K)).reshape(-1)
  each = [chosen(x) for x in found.heads]

  def index(name, layer):
    kept, own = each[layer]
    if name.endswith('/sinks'):
      return {H: own}
    return {G * K: wide(kept), H * K: wide(own)}
  return _cut(config, params, dict(heads=heads, groups=groups), index)


def _cut(config, params, change, index):
  """The model with a smaller config, its layers written out.

  Args:
    change: fields of the config.
    index: (name, layer or None) -> {size of an axis: what of it is kept}.
  """
  smaller = dataclasses.replace(config, **change)
  before, after = (shapes(abstract(configured(c, scan_layers=False))) for c in (config, smaller))

  def one(path, x):
    name = tree.name(path)
    value = x.value if isinstance(x, Dense) else x
    rest = name.split('/')
    layer = int(rest[1]) if rest[0] == 'layers' else None
    for axis, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
      if old == new:
        continue
      keep = index(name, layer).get(old)
      if keep is None or len(keep) != new:
        raise InputError(f'{name} has an axis of {old} that depends on {", ".join(change)} and '
                         'cannot be cut; cut this model in depth alone')
      value = jnp.take(value, jnp.asarray(keep), axis=axis)
    return x.replace_boxed(value) if isinstance(x, Dense) else value
  if before.keys() != after.keys():
    raise InputError(f'a model of other {", ".join(change)} has other weights; cut it in depth '
                     'alone')
  return smaller, jax.tree_util.tree_map_with_path(one, params, is_leaf=tree.is_weight)


def _check(what, count, most):
  if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= most:
    raise InputError(f'{what} {count!r} of a model of {most}; give 1 to {most}')


def _check_all(what, has, kind):
  if not all(has):
    raise InputError(f'{what} are of {kind}, which layer {has.index(False)} does not have; cut '
                     'layers alone, or the width')
