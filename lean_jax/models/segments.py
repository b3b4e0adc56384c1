"""How a stack's layers are cut into segments that are scanned, and trees brought from one cut to
another.

A uniform stack is one segment, and its weights stand under 'layers' itself, stacked. Otherwise a
segment has the name of its first layer, 'layers/3/...'; where several kinds repeat together, each
of them has its number in the period, 'layers/0/4/...'. Written-out layers are segments of one
layer.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from lean_jax.tree import is_weight

_STACKED = {nn.PARTITION_NAME: 'layers'}


class Segment(NamedTuple):
  """Consecutive layers: `kinds`, each what a `Block` takes, `count` times."""
  first: int
  kinds: tuple
  count: int
  stacked: bool

  @property
  def name(self):
    return str(self.first)


def segments(config):
  """The segments of a stack.

  Layers are taken as a beginning, in runs of one kind, and a pattern that repeats to the end, so
  that the fewest layers are compiled: DeepSeek's first dense layers and its expert layers; Jamba's
  eight kinds, again and again.
  """
  kinds = tuple((l.mixer, l.feed_forward, l.mixer_norm) for l in config.each)
  return _segments(kinds, config.scan_layers)


@functools.lru_cache
def _segments(kinds, scan):
  N = len(kinds)
  if not scan:
    return tuple(Segment(k, (kind,), 1, False) for k, kind in enumerate(kinds))
  changes = [k == 0 or kinds[k] != kinds[k - 1] for k in range(N)]
  cuts = [(sum(changes[:start]) + period, start, period)
          for start in range(N) for period in range(1, N - start + 1)
          if (N - start) % period == 0 and kinds[start:] == kinds[start:start + period]
          * ((N - start) // period)]
  _, start, period = min(cuts)
  runs = []
  for k in range(start):
    if runs and runs[-1].kinds == (kinds[k],):
      runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
    else:
      runs.append(Segment(k, (kinds[k],), 1, True))
  return (*runs, Segment(start, kinds[start:start + period], (N - start) // period, True))


def uniform(cut):
  """Whether segments are a single stack of one kind, which then needs no name."""
  return len(cut) == 1 and cut[0].stacked and len(cut[0].kinds) == 1


def located(config, path):
  """Which layers a leaf of the tree holds.

  Args:
    config: of the stack.
    path: 'layers/0/4/attention/q/kernel', say, or any other name.

  Returns:
    'layers/attention/q/kernel', and the numbers of the layers that stand along the leaf's first
    axis; an int for a layer that is not stacked; None for what is no layer's.
  """
  head, *rest = path.split('/')
  if head != 'layers':
    return path, None
  cut = segments(config)
  if uniform(cut):
    return path, tuple(range(cut[0].count))
  s = next(s for s in cut if s.name == rest[0])
  P, inner = len(s.kinds), rest[1:]
  k, inner = (int(inner[0]), inner[1:]) if P > 1 else (0, inner)
  at = tuple(range(s.first + k, s.first + s.count * P, P))
  return '/'.join(['layers', *inner]), at if s.stacked else at[0]


def unstacked(config, layers):
  """The tree of each layer, of the tree under 'layers'."""
  out, cut = [], segments(config)
  for s in cut:
    own = layers if uniform(cut) else layers[s.name]
    parts = [own] if len(s.kinds) == 1 else [own[str(k)] for k in range(len(s.kinds))]
    out += [taken(part, k) if s.stacked else part for k in range(s.count) for part in parts]
  return out


def restacked(config, trees):
  """The inverse of `unstacked`: the tree under 'layers', of the tree of each layer."""
  cut, out = segments(config), {}
  for s in cut:
    P = len(s.kinds)
    own = trees[s.first:s.first + s.count * P]
    parts = [_stacked(own[k::P]) if s.stacked else own[0] for k in range(P)]
    out[s.name] = parts[0] if P == 1 else {str(k): part for k, part in enumerate(parts)}
  return out[cut[0].name] if uniform(cut) else out


def configured(config, **settings):
  """The config with settings that concern each of its stacks: dtype, remat, scan_layers."""
  inner = {f.name: configured(value, **settings) for f in dataclasses.fields(config)
           if hasattr(value := getattr(config, f.name), 'scan_layers')}
  own = {f.name: settings[f.name] for f in dataclasses.fields(config) if f.name in settings}
  return dataclasses.replace(config, **own, **inner)


def converted(config, params, scan_layers):
  """The model with layers of one kind stacked, or each written out: every value as it was.

  Args:
    config: of the model, of one stack or several.
    params: of `config.module`, of any kinds of weights.
    scan_layers: whether they are to be stacked.

  Returns:
    config, params.
  """
  other = configured(config, scan_layers=scan_layers)
  if other == config:
    return config, params
  for prefix, stack in config.stacks.items():
    change = lambda layers, old=stack, new=other.stacks[prefix]: restacked(
        new, unstacked(old, layers))
    params = replaced(params, f'{prefix}layers'.split('/'), change)
  return other, params


def extended(config, layers, make):
  """The tree under 'layers' with more in each layer; what is there is neither cut nor copied.

  Args:
    config: of the stack.
    make: (a layer's kind, as `Segment` has it; how many are stacked, or None) -> {name: subtree}.
  """
  cut, out = segments(config), {}
  for s in cut:
    own, count = layers if uniform(cut) else layers[s.name], s.count if s.stacked else None
    more = [make(kind, count) for kind in s.kinds]
    out[s.name] = {**own, **more[0]} if len(more) == 1 else {
        str(k): {**own[str(k)], **part} for k, part in enumerate(more)}
  return out[cut[0].name] if uniform(cut) else out


def replaced(tree, path, change):
  """The nested dict with what is at a path changed."""
  if not path:
    return change(tree)
  return {**tree, path[0]: replaced(tree[path[0]], path[1:], change)}


def taken(tree, k):
  """The tree of layer k, of a tree whose arrays have a layer axis first."""
  def one(w):
    part = jax.tree.map(lambda x: _row(x, k) if isinstance(x, jax.Array) else x[k], w)
    return part.remove_axis(w.dims.index('n'), _STACKED) if is_weight(w) else part
  return jax.tree.map(one, tree, is_leaf=is_weight)


# One program each, whatever the row.
_row = jax.jit(lambda x, k: jax.lax.dynamic_index_in_dim(x, k, 0, keepdims=False))
_joined = jax.jit(jnp.stack)


def _stacked(trees):
  def one(*ws):
    if is_weight(ws[0]):
      ws = type(ws[0]).alike(ws)
    whole = jax.tree.map(lambda *xs: _joined(xs), *ws)
    return whole.add_axis(0, _STACKED) if is_weight(ws[0]) else whole
  return jax.tree.map(one, *trees, is_leaf=is_weight)
