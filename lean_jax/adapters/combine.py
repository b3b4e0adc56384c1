"""Several LoRA adapters of one base made one: by weights, TIES or DARE.

A method by its plain name works on the factors a and b by themselves, which is cheap and rough: the
sum of products is not the product of sums. By its name with _svd it works on the differences a @ b
and takes the nearest of a rank; 'cat' puts the factors side by side, which is exact. The names, and
what is merged for itself (each matrix of each layer), are as in the PEFT library.
"""
import math

import jax
import jax.numpy as jnp

from lean_jax import tree
from lean_jax.adapters.lora import check_rank, sides
from lean_jax.adapters.several import check_base
from lean_jax.errors import InputError
from lean_jax.weights import Adapter, LowRank

PLAIN = ('linear', 'magnitude_prune', 'ties', 'dare_linear', 'dare_ties')
METHODS = ('cat', *PLAIN, 'svd', *(f'{name}_svd' for name in PLAIN[1:]))


def combined(adapted, method='svd', *, weights=None, density=None, rank=None, key=None):
  """The tree of one base with one adapter made of several.

  Args:
    adapted: {name: params}, of LoRA over the very same base.
    method: of `METHODS`. 'magnitude_prune' keeps a part of the numbers, the largest; 'ties' that,
      and then of each place's those of the sign that has the greater sum, of which it takes the
      mean (Yadav et al. 2023, arXiv:2306.01708, section 3); 'dare' keeps a random part, and makes
      it larger by as much (Yu et al. 2023, arXiv:2311.03099, section 3.1).
    weights: a number for each; None is 1 / their count, or 1 where a mean is taken (ties).
    density: the part that is kept, above 0 and at most 1, of methods that drop numbers.
    rank: of the result, of 'svd'; None is the greatest of theirs.
    key: a jax PRNG key, of what 'dare' drops.

  Raises:
    InputError: no such method, other adapters than LoRA, another base, ranks that differ for a
      method that works on factors, or a setting that is missing, out of range or of another one.
  """
  adapted = dict(adapted)
  if not adapted:
    raise InputError('no adapters to combine; give {name: model}')
  if method not in METHODS:
    raise InputError(f'no method {method!r} to combine adapters; there are: {", ".join(METHODS)}')
  drops = method.startswith(('ties', 'dare', 'magnitude'))
  if drops != (density is not None) or (drops and not 0 < density <= 1):
    raise InputError(f'density {density} for method {method!r}; ' + (
        'give a part above 0 and at most 1' if drops else 'it drops nothing: leave it out'))
  if rank is not None and not method.endswith('svd'):
    raise InputError(f'rank {rank} for method {method!r}, whose rank follows from the adapters; '
                     'leave it out, or use svd')
  names, trees = list(adapted), list(adapted.values())
  weights = _weights(weights, names, 'ties' in method)
  for name, params in adapted.items():
    check_base(names[0], trees[0], name, params)
  key = jax.random.key(0) if key is None else key
  count = iter(range(1 << 30))

  def one(*ws):
    some = [(w, weight) for w, weight in zip(ws, weights) if isinstance(w, Adapter)]
    if not some:
      return ws[0]
    if any(not isinstance(w, LowRank) or isinstance(w.base, Adapter) for w, _ in some):
      raise InputError('adapters other than LoRA, or upon others, cannot be combined; merge them')
    return _one(some, method, density, rank, jax.random.fold_in(key, next(count)))
  out = jax.tree.map(one, *trees, is_leaf=tree.is_weight)
  if not any(isinstance(w, Adapter) for w in tree.named_weights(out).values()):
    raise InputError('none of the models has an adapter to combine; attach or load some')
  return out


def _weights(given, names, mean):
  if given is None:
    return [1. if mean else 1 / len(names)] * len(names)
  if isinstance(given, dict):
    if given.keys() != set(names):
      raise InputError(f'weights of {", ".join(given)}, and the adapters are {", ".join(names)}')
    given = [given[name] for name in names]
  if len(given) != len(names):
    raise InputError(f'{len(given)} weights for {len(names)} adapters; give one each')
  return [float(w) for w in given]


def _one(some, method, density, rank, key):
  """The LowRank of several over one base, [(LowRank, weight)]."""
  first = some[0][0]
  both, inputs, outputs = sides(first)
  L = math.prod(both)
  a = [w.a.reshape(L, -1, w.a.shape[-1]) for w, _ in some]             # [L I R] each
  b = [w.b.reshape(L, w.a.shape[-1], -1) for w, _ in some]             # [L R O] each
  scaled = [weight * w.scale for w, weight in some]
  if method == 'cat':
    a = jnp.concatenate([x * s for x, s in zip(a, scaled)], axis=2)
    b = jnp.concatenate(b, axis=1)
  elif method.endswith('svd'):
    rank = max(x.shape[2] for x in a) if rank is None else rank
    check_rank(first, rank)
    merge = _merge(method.removesuffix('_svd').replace('svd', 'linear'), density)
    difference = merge([w.scale * (x @ y) for (w, _), x, y in zip(some, a, b)],
                       [weight for _, weight in some], key)
    u, s, v = jnp.linalg.svd(difference, full_matrices=False)
    a, b = u[..., :rank], s[..., :rank, None] * v[:, :rank]
  else:
    ranks = sorted({x.shape[2] for x in a})
    if len(ranks) > 1:
      raise InputError(f'method {method!r} works on factors, and these have ranks {ranks}; use '
                       f'{"svd" if method == "linear" else method + "_svd"}')
    merge = _merge(method, density)
    to_a, to_b = jax.random.split(key)
    root = [math.sqrt(abs(s)) for s in scaled]
    a = merge(a, [r * math.copysign(1, s) for r, s in zip(root, scaled)], to_a)
    b = merge(b, root, to_b)
  R = a.shape[-1]
  return LowRank(first.base, a.reshape(*both, *inputs, R), b.reshape(*both, R, *outputs), 1.)


def _merge(method, density):
  """The function from several [L ...] arrays, their weights and a key to one."""
  keep = dict(linear=lambda x, key: x, magnitude_prune=lambda x, key: largest(x, density),
              ties=lambda x, key: largest(x, density))
  keep = keep.get(method, lambda x, key: dropped(x, density, key))

  def merge(xs, weights, key):
    x = jnp.stack([keep(x, jax.random.fold_in(key, k)) for k, x in enumerate(xs)])
    weighted = x * jnp.asarray(weights, x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    if not method.endswith('ties'):
      return jnp.sum(weighted, axis=0)
    elected = jnp.sign(x) == jnp.where(jnp.sum(x, axis=0) >= 0, 1., -1.)[None]
    return jnp.sum(weighted * elected, axis=0) / jnp.maximum(jnp.sum(elected, axis=0), 1)
  return merge


def largest(x, density):
  """x [L ...] with the part `density` of each [...] that is largest; the others are zero."""
  count = int(density * math.prod(x.shape[1:]))

  @jax.vmap
  def one(flat):
    _, at = jax.lax.top_k(jnp.abs(flat), count)
    return jnp.zeros_like(flat).at[at].set(flat[at])
  return one(x.reshape(len(x), -1)).reshape(x.shape)


def dropped(x, density, key):
  """x with a random part `density` of it, larger by as much; the rest is zero."""
  return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)
