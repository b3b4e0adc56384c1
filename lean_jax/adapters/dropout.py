"""Dropout in the adapters of a step of training.

A weight draws no random numbers by itself. A step's loss is given a key, and gives each adapter
one of its own: it is an array in the weight, as the others, so that layers which are stacked take
theirs, and a layer that is computed again drops the same inputs.
"""
import dataclasses
import functools

import jax

from lean_jax import tree
from lean_jax.weights import LowRank, Wrapper


def drops_out(params):
  """Whether an adapter has a dropout."""
  def one(w):
    return isinstance(w, Wrapper) and (getattr(w, 'dropout', 0) > 0 or one(w.base))
  return any(map(one, tree.named_weights(params).values()))


def with_keys(params, key):
  """The tree whose adapters drop out, each by a key of its own."""
  def one(w, key):
    if not isinstance(w, Wrapper):
      return w
    w = dataclasses.replace(w, base=one(w.base, jax.random.fold_in(key, 0)))
    if not isinstance(w, LowRank) or not w.dropout:
      return w
    layers = w.a.shape[:w.dims.count('n')]
    return dataclasses.replace(w, keys=jax.random.split(jax.random.fold_in(key, 1), layers))
  return tree.transform(params, [('.*', one)], key=key)


@functools.lru_cache
def dropping(loss):
  """The loss (params, batch, key, **frozen) with dropout in the adapters of params."""
  def dropped(params, batch, key, **frozen):
    to_loss, to_adapters = jax.random.split(key)
    return loss(with_keys(params, to_adapters), batch, to_loss, **frozen)
  return dropped
