"""What state space models share: padding put last, a short convolution, and a scan over chunks."""
import math

import jax
import jax.numpy as jnp
from flax import linen as nn


class ShortConv(nn.Module):
  """Each channel of x filtered over its last K tokens, in float32."""
  taps: int                     # K
  bias: bool = True

  @nn.compact
  def __call__(self, x, real=None, state=None):
    """The filtered x, and the inputs that the next call will need.

    Args:
      x: [B T C].
      real: [B T] bool, which tokens count, the first ones of each row; None for all.
      state: [B K-1 C], the inputs before; None is zeros.

    Returns:
      [B T C] float32, and [B K-1 C], the last real inputs.
    """
    (B, T, C), K = x.shape, self.taps
    start = lambda key, shape: jax.random.uniform(key, shape, minval=-K ** -.5, maxval=K ** -.5)
    kernel = self.param('kernel', start, (K, C)).astype(jnp.float32)
    before = jnp.zeros((B, K - 1, C)) if state is None else state
    x = jnp.concatenate([before.astype(x.dtype), x], axis=1)             # [B K-1+T C]
    wide = x.astype(jnp.float32)
    y = sum(wide[:, k:k + T] * kernel[k].reshape(1, 1, C) for k in range(K))
    if self.bias:
      bias = self.param('bias', nn.initializers.zeros, (C,)).astype(jnp.float32)
      y = y + bias.reshape(1, 1, C)
    if real is None:
      return y, x[:, T:]
    last = jnp.sum(real, axis=1, keepdims=True) + jnp.arange(K - 1)[None]
    return y, jnp.take_along_axis(x, last[:, :, None], axis=1)


def packed(x, mask):
  """Each row's real tokens first, in their order: padding then has no successor.

  Args:
    x: [B T D].
    mask: [B T] bool, which tokens are real; None for all.

  Returns:
    x [B T D] in that order, which of it is real [B T] (None for all), and the function that puts
    [B T D] back in the old order.
  """
  if mask is None:
    return x, None, lambda y: y
  rank = jnp.cumsum(mask, axis=1) - 1
  count = jnp.sum(mask, axis=1, keepdims=True)
  place = jnp.where(mask, rank, count + jnp.cumsum(~mask, axis=1) - 1)     # of each, in the new one
  take = lambda x, at: jnp.take_along_axis(x, at[:, :, None], axis=1)
  real = jnp.arange(mask.shape[1])[None] < count
  return take(x, jnp.argsort(place, axis=1)), real, lambda y: take(y, place)


def over_chunks(body, state, xs, chunk):
  """A scan over chunks of tokens; the backward pass computes what is inside a chunk again.

  Args:
    body: (state, xs of a chunk) -> (state, y [B C ...]). Tokens of zeros leave the state alone.
    state: arrays.
    xs: a tuple of [B T ...].
    chunk: C, tokens.

  Returns:
    the last state, and y [B T ...].
  """
  B, T = xs[0].shape[:2]
  if chunk >= T:
    return body(state, xs)
  n = math.ceil(T / chunk)

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, n, chunk, *x.shape[2:]), 1, 0)        # [n B C ...]
  state, y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, tuple(map(cut, xs)))
  return state, jnp.moveaxis(y, 0, 1).reshape(B, n * chunk, *y.shape[3:])[:, :T]


def time_step_bias(key, shape):
  """Biases whose softplus is spread evenly by logarithm over .001 to .1, as Mamba starts."""
  dt = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(.1)))
  return dt + jnp.log(-jnp.expm1(-dt))
