"""A model on a batch, whatever its architecture: outputs, what they should be, and what counts.

A batch is a dict of arrays: `tokens` [B T], and as the model and the task want them `mask` [B T]
(which tokens are real), `token_types` [B T], `segments` [B T] (which of a row's texts a token is
of, 0 where of none), `decoder_tokens` [B U], `decoder_mask` [B U], and `labels`: [B T] or [B], the
targets of each position or of each row, negative where none.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType

INPUTS = ('tokens', 'mask', 'token_types', 'segments', 'decoder_tokens', 'decoder_mask')


def forward(module, params, batch):
  """The outputs of a model, [B T V] or [B C], and the sum of its layers' auxiliary losses."""
  outputs, auxiliary, _ = run(module, params, batch)
  return outputs, auxiliary


def run(module, params, batch, taps=(), method=None):
  """What a method of a model gives of a batch; None is its call.

  Args:
    taps: collections to look at, of `nn.taps`.

  Returns:
    its outputs; the sum of the layers' auxiliary losses; {collection: tree} of the taps.
  """
  given = {k: batch[k] for k in INPUTS if k in batch}
  (outputs, _), sown = module.apply({'params': params}, **given, mutable=['losses', *taps],
                                    method=method)
  auxiliary = sum((jnp.sum(x) for x in jax.tree.leaves(sown.pop('losses', ()))), jnp.zeros(()))
  return outputs, auxiliary, sown


class Hidden(NamedTuple):
  """A model on a batch, but for its head's product, from which losses follow without all logits.

  Attributes:
    states: [B*T D].
    matrix: of the head.
    head: how products with it are logits, as `kernels.distill_loss` takes it.
    auxiliary: the sum of the layers' auxiliary losses.
    taps: {collection: tree}.
  """
  states: Any
  matrix: Any
  head: Any
  auxiliary: Any
  taps: Any


def hidden(module, params, batch, taps=()):
  """The Hidden of a model; None of one whose outputs are no product of `hidden` and a matrix."""
  found = module.head_of(params) if hasattr(module, 'head_of') else None
  if found is None:
    return None
  x, auxiliary, sown = run(module, params, batch, taps, 'hidden')
  return Hidden(x.reshape(-1, x.shape[-1]), *found, auxiliary, sown)


def token_axes():
  """The axes of the mesh that is set over which the compiler spreads a batch's rows."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  axes, = nn.logical_to_mesh_axes(('batch',)) or (None,)
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return tuple(a for a in axes if kinds.get(a, AxisType.Manual) != AxisType.Manual
               and mesh.shape[a] > 1)


def masked_mean(values, mask):
  """The mean of values where the mask, of their shape, is 1; 0 where it is nowhere."""
  return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def targets(batch):
  """Integer targets and their mask: the labels if there are any, else the token after each.

  Returns:
    targets, float32 mask: both [B T] or [B].
  """
  if 'labels' in batch:
    labels = batch['labels']
    return jnp.maximum(labels, 0), (labels >= 0).astype(jnp.float32)
  side = 'decoder_' if 'decoder_tokens' in batch else ''
  tokens, mask = batch[f'{side}tokens'], batch.get(f'{side}mask')
  following = jnp.roll(tokens, -1, axis=1)
  inside = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None] < tokens.shape[1] - 1, tokens.shape)
  if mask is not None:
    inside = inside & mask.astype(bool) & jnp.roll(mask, -1, axis=1).astype(bool)
  if (segments := batch.get('segments')) is not None:
    inside = inside & (segments > 0) & (segments == jnp.roll(segments, -1, axis=1))
  return following, inside.astype(jnp.float32)
