"""Which weights of a layer read the same input, and what makes it.

Scales that move from an input into the rows of its readers (AWQ, SmoothQuant) must be the same for
all of them, and divide free of charge where the operation before takes them in: a norm's scale, or
the columns of a weight whose output the readers' input is a multiple of.
"""
from typing import NamedTuple

import jax.numpy as jnp
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.models.kinds import FEED_FORWARDS, MIXERS
from lean_jax.models.segments import replaced
from lean_jax.quantization.equalization import broadcast, divided_norm, out_scaled, scaled
from lean_jax.tree import is_weight
from lean_jax.weights import Dense, Rescaled
from lean_jax.weights.base import to_matrix


class Shared(NamedTuple):
  """An input of a layer.

  Attributes:
    readers: paths within the layer of the modules that multiply it, 'attention/q'.
    norm: path of the norm whose output it is, or None.
    writer: path of the module whose output it is, times something else; or None.
  """
  readers: tuple
  norm: str | None = None
  writer: str | None = None


def inputs(config, kind, tree):
  """The inputs that weights of a layer's tree read, as Shared; each weight is in one of them.

  Args:
    config: of the stack.
    kind: what a `Block` takes: mixer, feed-forward, whether the mixer's input is normalised.
  """
  c, (mixer, forward, mixer_norm) = config, kind
  named = lambda block, module: tuple(f'{block}/{r}' for r in module.reads)
  first = named(mixer, MIXERS[mixer].module)
  second = () if forward is None else named(forward, FEED_FORWARDS[forward])
  norm = lambda name: name if c.norm_before and 'scale' in tree.get(name, {}) else None
  if c.parallel and c.shared_norm:
    found = [Shared(first + second, norm('mixer_norm'))]
  else:
    found = [Shared(first, norm('mixer_norm') if mixer_norm else None),
             Shared(second, norm('feed_forward_norm'))]
  found.append(Shared(('cross/q',), norm('cross_norm')))
  if c.mlp.gated:
    found += [Shared((f'{at}down',), writer=f'{at}up') for at in ('mlp/', 'moe/shared/')]
  if c.moe is not None and c.moe.limit is None:
    found.append(Shared(('moe/experts/down',), writer='moe/experts/up'))
  if c.heads == c.groups:
    found.append(Shared(('attention/o',), writer='attention/v'))
  found = [s._replace(readers=tuple(r for r in s.readers if at(tree, r) is not None))
           for s in found]
  known = {r for s in found for r in s.readers}
  alone = [Shared((path,)) for path in modules(tree) if path not in known]
  return [s for s in (*found, *alone) if s.readers]


def modules(tree, path=''):
  """Paths of all modules of a tree that have a weight named kernel."""
  out = []
  for name, value in tree.items():
    if isinstance(value, dict):
      here = f'{path}{name}'
      out += [here] * is_weight(value.get('kernel')) + modules(value, f'{here}/')
  return out


def at(tree, path):
  """The kernel of the module at a path, a weight or an array; None where there is none."""
  for key in path.split('/'):
    tree = tree.get(key) if isinstance(tree, dict) else None
    if tree is None:
      return None
  return tree.get('kernel')


def equalized(config, kind, tree, rules, stats):
  """A layer's tree and statistics after the scales of its rules, every product as it was.

  Args:
    config, kind, tree: of the layer; see `inputs`.
    rules: {name of a weight: methods.Bound}.
    stats: {name: Statistics} of the weights' inputs.
  """
  stats = dict(stats)
  for shared in inputs(config, kind, tree):
    wanted = [r for r in shared.readers
              if (n := f'{r}/kernel') in stats and n in rules and rules[n].scales]
    if not wanted:
      continue
    weights = [at(tree, r) for r in wanted]
    odd = next((w for w in weights if not isinstance(w, Dense)), None)
    if odd is not None:
      raise InputError(f'{wanted[0]}/kernel: a {type(odd).__name__} weight cannot be scaled; start '
                       'from the float model')
    matrices = [to_matrix(meta.unbox(w), w.dims).astype(jnp.float32) for w in weights]
    s = rules[f'{wanted[0]}/kernel'].scales(matrices, [stats[f'{r}/kernel'] for r in wanted])
    tree, moved = _moved(config, tree, shared, wanted, s)
    stats |= {n: stats[n].divided(s) for r in moved if (n := f'{r}/kernel') in stats}
  return tree, stats


def _moved(config, tree, shared, wanted, s):
  """The tree with an input divided by s [I] and its readers' rows times s; and which readers."""
  put = lambda tree, path, change: replaced(tree, path.split('/'), change)
  plain = all(isinstance(w, Dense) or not is_weight(w)
              for w in (at(tree, r) for r in shared.readers))
  writer = at(tree, shared.writer) if shared.writer else None
  if plain and shared.norm:
    tree = put(tree, shared.norm, lambda norm: divided_norm(norm, s, config.norm_offset))
  elif plain and isinstance(writer, Dense):
    tree = put(tree, shared.writer, lambda module: _out_scaled(module, s))
  else:
    by = lambda w: broadcast(1 / s, to_matrix(meta.unbox(w), w.dims))
    for r in wanted:
      tree = put(tree, f'{r}/kernel', lambda w: Rescaled(scaled(w, s), by(w)))
    return tree, wanted
  for r in shared.readers:
    tree = put(tree, f'{r}/kernel', lambda w: scaled(w, s) if is_weight(w) else w * s[:, None])
  return tree, shared.readers


def _out_scaled(module, s):
  """A module's kernel and bias whose output is divided by s [O]."""
  out = dict(module, kernel=out_scaled(module['kernel'], s))
  if 'bias' in module:
    bias = module['bias']
    out['bias'] = (bias / s.reshape((1,) * (bias.ndim - 1) + s.shape)).astype(bias.dtype)
  return out
