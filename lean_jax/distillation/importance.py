"""What of a model matters: its layers, heads, hidden units and channels, by what a text makes of
them.

Layers by block influence: Men et al. 2024 (ShortGPT, arXiv:2403.03853), section 2.2. Widths by the
size of activations: Muralidharan et al. 2024 (Minitron, arXiv:2407.14679), section 2.2, with the
mean over a sequence and the L2 norm over sequences, its best (table 13 there). No gradient, one
pass.
"""
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.calibration import blocks
from lean_jax.calibration.observer import Notes, observed
from lean_jax.distillation.losses import tapped
from lean_jax.errors import InputError
from lean_jax.models.kinds import FEED_FORWARDS, MIXERS
from lean_jax.models.stack import Block
from lean_jax.nn.taps import STATES
from lean_jax.objectives.forward import run
from lean_jax.weights.base import as_matmul


class Importance(NamedTuple):
  """Scores of a model's parts, the greater the more it matters; None of what a layer has not.

  Attributes:
    heads: of each layer [H], of attention.
    hidden: of each layer [F], of an MLP.
    channels: [D], of the residual stream.
  """
  heads: list[Any]
  hidden: list[Any]
  channels: Any


def block_influence(config, params, batches):
  """[N], 1 - the mean cosine of each layer's input and output, over the tokens that are real.

  Args:
    config: of a decoder or an encoder.
    batches: what `objectives.forward` takes.
  """
  check_one_stack(config)
  totals, counts = zip(*(_cosines(config, params, batch) for batch in batches))
  return np.asarray(1 - sum(totals) / sum(counts))


def importance(config, params, batches):
  """The Importance of a model's parts; args as `block_influence` has them."""
  check_one_stack(config)
  flow = [blocks.entries(config.module, params, batch, '') for batch in batches]
  heads, hidden, channels = [], [], 0.
  for site in blocks.sites(config):
    mixer, feed_forward, _ = site.kind
    tree, at = blocks.layer(params, site), blocks.place(config, site)
    each = [_noted(config, site.kind, tree, e.x, at, e.frame) for e in flow]
    score = jax.tree.map(lambda *x: np.sqrt(sum(map(np.asarray, x))), *each)
    heads.append(score['attention/o/kernel'].heads if mixer == 'attention' else None)
    hidden.append(score['mlp/down/kernel'].inputs if feed_forward == 'mlp' else None)
    for block, kind in ((mixer, MIXERS[mixer].module),
                        (feed_forward, FEED_FORWARDS.get(feed_forward))):
      first = [f'{block}/{n}/kernel' for n in getattr(kind, 'reads', ())]
      channels = channels + next((score[n].inputs for n in first
                                  if n in score and score[n].inputs is not None), 0.)
    flow = [e._replace(x=blocks.through(config, site.kind, tree, e.x, at, e.frame)) for e in flow]
  return Importance(heads, hidden, np.asarray(channels))


class _Squares(NamedTuple):
  """Squares of mean sizes, summed over rows: of a weight's inputs [I], and of these as heads [H];
  None where they are not of tokens, or no heads.
  """
  inputs: Any = None
  heads: Any = None

  def add(self, other):
    """Of both."""
    return jax.tree.map(jnp.add, self, other)


class _Sizes(Notes):
  """Notes of `_Squares`."""

  def __init__(self, mask, head_width, shape):
    super().__init__(mask)
    self._width, self._shape = head_width, shape

  def _statistics(self, x, eqn, w, sizes):
    if sizes is not None:
      return _Squares()
    rows, _ = as_matmul(eqn, x, w.dims, w.shape)
    if rows.shape[:-1] != (self._shape[0] * self._shape[1],):
      return _Squares()
    x = rows.reshape(*self._shape, -1).astype(jnp.float32)
    if not self._width or x.shape[-1] % self._width:
      return _Squares(self._squared(jnp.abs(x)))
    heads = jnp.linalg.norm(x.reshape(*self._shape, -1, self._width), axis=-1)
    return _Squares(self._squared(jnp.abs(x)), self._squared(heads))

  def _squared(self, size):
    """[n], the sum over rows of the square of the mean over real tokens, of [B T n]."""
    real = jnp.ones(self._shape) if self._mask is None else self._mask.astype(jnp.float32)
    mean = jnp.einsum('btn,bt->bn', size, real) / jnp.maximum(
        jnp.sum(real, axis=1, keepdims=True), 1)
    return jnp.sum(mean * mean, axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _cosines(config, params, batch):
  """[N], summed over the tokens that are real; and how many those are."""
  shown = tapped(config, run(config.module, params, batch, (STATES,))[2])
  states = [shown.embedding, *(layer['hidden'] for layer in shown.layers)]
  real = batch.get('mask', jnp.ones(batch['tokens'].shape, bool)).astype(jnp.float32)
  cosines = jnp.stack([_cosine(x, y) for x, y in itertools.pairwise(states)])        # [N B T]
  return jnp.sum(cosines * real[None], axis=(1, 2)), jnp.sum(real)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _noted(config, kind, params, x, at, frame):
  """{name within the layer: _Squares} for x [B T D]."""
  notes = _Sizes(frame.mask, config.head_width, x.shape[:2])
  Block(config, *kind).apply({'params': observed(params, notes)}, (x, None), at, frame)
  return notes.found


def _cosine(x, y):
  """[B T] of [B T D]; 0 where one is 0."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  product = lambda a, b: jnp.sum(a * b, axis=-1)
  return product(x, y) / jnp.sqrt(jnp.maximum(product(x, x) * product(y, y), 1e-24))


def check_one_stack(config):
  """Raises InputError for an encoder with a decoder."""
  if len(config.stacks) > 1:
    raise InputError('importance is of the layers of one stack, and this model is an encoder and a '
                     'decoder; start such a student from chosen layers')
