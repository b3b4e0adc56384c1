"""QuaRot: the residual stream turned by a random rotation, so that no channel of it stands out.

Ashkboos et al. 2024 (arXiv:2404.00456), section 4, stage 1a: each norm's scale is folded into the
weights that read it, and RMS(x R) = RMS(x) for a rotation R. What writes the stream is multiplied
by R from the right, what reads it by R^T from the left: every logit stays, and nothing is computed
that was not before. Values are turned too, each head within itself, and back in the product after
it (stage 1c, without its Hadamard product across heads).

What the paper adds while the model runs is left out: the inputs of `down`, and heads among each
other, are as they were.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.kinds import FEED_FORWARDS, MIXERS
from lean_jax.models.segments import configured, segments, uniform
from lean_jax.tree import is_weight, named_weights
from lean_jax.weights import Dense
from lean_jax.weights.base import from_matrix, to_matrix, unstacked

_REFUSED = dict(
    norm_after='a norm after each branch has scales that no weight takes in',
    norm_sum='a norm of each sum has scales that stand in the stream itself',
    embedding_norm='the norm of the embeddings has scales that stand in the stream itself',
    parallel='both branches of a layer read its input, which is not done here',
    cross='its layers read another stack, whose stream is not the same')


def rotate(config, params, key):
  """The model in a rotated basis, which computes what it did, up to rounding.

  Its head is no longer the embedding's transpose, as only the head takes in the last norm's scale.

  Args:
    config: of a decoder with RMS norms before its branches.
    params: of `config.module`, floats.
    key: a jax PRNG key.

  Returns:
    config, params.

  Raises:
    InputError: what the config's structure has in the way, or weights that are not dense.
  """
  stream, heads = jax.random.split(key)
  R = hadamard(stream, config.width)
  U = hadamard(heads, config.head_width) if config.head_width else None
  return turned(config, params, R, U)


def turned(config, params, R, U=None):
  """As `rotate`, by given matrices.

  Args:
    R: [D D], orthogonal: a state x of the stream is x R from now on. The identity folds the norms'
      scales, and no more.
    U: [K K], the same of each value of attention; None leaves them.
  """
  check(config, params)
  out = jax.jit(functools.partial(_turned, config))(params, R, U)
  return configured(config, tied=False), out


def check(config, params):
  """Raises InputError if a model cannot be rotated, and says why."""
  refuse = lambda why: InputError(
      f'the model cannot be rotated: {why}; rotate a decoder like Llama')
  if not isinstance(config, DecoderConfig):
    raise refuse('it is no decoder, one stack of layers and a head')
  if config.norm != 'rms':
    raise refuse('its norms take the mean away, which no rotation leaves as it is')
  if not config.norm_before:
    raise refuse('its branches read the stream without a norm')
  for field, why in _REFUSED.items():
    if getattr(config, field):
      raise refuse(why)
  if config.embedding_width not in (None, config.width):
    raise refuse('its embeddings are narrower than the stream')
  weights = named_weights(params)
  other = [n for n, w in weights.items() if type(w) is not Dense]
  if other:
    raise InputError(f'{other[0]} is a {type(weights[other[0]]).__name__} weight; rotate the float '
                     'model, then quantize or adapt it')


def hadamard(key, size):
  """A random rotation [size size], which spreads each number evenly over as many as it can.

  size = m 2^k, m odd: a random orthogonal matrix [m m] kron the Hadamard matrix of 2^k, its rows
  with random signs. A power of two has m = 1, the paper's randomized Hadamard matrix.
  """
  power = size & -size
  h = functools.reduce(np.kron, [np.array([[1., 1.], [1., -1.]])] * (power.bit_length() - 1),
                       np.ones((1, 1))) / np.sqrt(power)
  odd, signs = jax.random.split(key)
  q, _ = jnp.linalg.qr(jax.random.normal(odd, (size // power,) * 2))
  return jax.random.rademacher(signs, (size, 1), jnp.float32) * jnp.kron(q, h.astype(np.float32))


def _turned(config, params, R, U):
  """The parameters of the rotated model."""
  out = jax.tree.map(lambda x: x, params, is_leaf=is_weight)           # dicts of its own
  for at, kind in _blocks(config, out):
    _turn_block(config, at, kind, R, U)
  for name in ('embed', 'positions', 'token_types'):
    if name in out:
      out[name]['table'] = changed(out[name]['table'], lambda table: product(R.T, table))
  scale = _taken_scale(config, out['norm']) if config.final_norm else None
  if config.tied:
    table = params['embed']['table']
    out['head'] = {'kernel': Dense(table.value.T, 'io', table.axes[::-1])}
    if config.head_bias:
      out['head']['bias'] = out.pop('head_bias')
  out['head']['kernel'] = changed(out['head']['kernel'], reading(scale, R))
  return out


def _turn_block(config, at, kind, R, U):
  """Turns the weights of one layer, or of several stacked, in place."""
  mixer, feed_forward, normed = kind
  branches = [(mixer, MIXERS[mixer].module, 'mixer_norm' if normed else None)]
  if feed_forward is not None:
    branches.append((feed_forward, FEED_FORWARDS[feed_forward], 'feed_forward_norm'))
  for name, module, norm in branches:
    scale = None if norm is None else _taken_scale(config, at[norm])
    for path in module.reads:
      _change(at[name], path, reading(scale, R))
    for path in module.writes:
      _change(at[name], path, lambda w: product(w, R), lambda b: product(b, R))
  if mixer == 'attention' and U is not None:
    within = lambda x: product(x.reshape(*x.shape[:-1], -1, len(U)), U).reshape(x.shape)
    _change(at[mixer], 'v', within, within)
    _change(at[mixer], 'o', lambda w: within(w.swapaxes(-1, -2)).swapaxes(-1, -2))


def reading(scale, R):
  """The function of a matrix [... D O] that is to read the rotated stream without the norm's scale.

  Args:
    scale: [D] or [n D]; None is 1.
    R: [D D].
  """
  def read(w):
    if scale is not None:
      ones = (1,) * (w.ndim - 1 - scale.ndim)
      w = w * scale.reshape(*scale.shape[:-1], *ones, scale.shape[-1], 1)
    return product(R.T, w)
  return read


def product(a, b):
  """a @ b in float32, also where the device's own precision is less."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def changed(w, change):
  """The weight, or array [... I O], whose matrix [*n *e I O] is changed in float32."""
  if not is_weight(w):
    return change(w.astype(jnp.float32)).astype(w.dtype)
  value = meta.unbox(w)
  matrix = change(to_matrix(value, w.dims).astype(jnp.float32)).astype(value.dtype)
  return w.replace_boxed(from_matrix(matrix, w.dims, unstacked(value.shape, w.dims)))


def _change(block, path, kernel, bias=None):
  """Changes the kernel at a path, and the bias if there is one and `bias` says how, in place."""
  for part in path.split('/'):
    if part not in block:                                # of another variant of the block
      return
    block = block[part]
  block['kernel'] = changed(block['kernel'], kernel)
  if bias is not None and 'bias' in block:
    block['bias'] = changed(block['bias'], bias)


def _taken_scale(config, norm):
  """The scale of a norm, float32, which is 1 from now on; in place."""
  scale = norm['scale']
  norm['scale'] = jnp.full_like(scale, 1 - config.norm_offset)
  return scale.astype(jnp.float32) + config.norm_offset


def _blocks(config, params):
  """The tree and the kind of each block, those that are stacked as one."""
  cut = segments(config)
  for s in cut:
    own = params['layers'] if uniform(cut) else params['layers'][s.name]
    for k, kind in enumerate(s.kinds):
      yield own[str(k)] if len(s.kinds) > 1 else own, kind
