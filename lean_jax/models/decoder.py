"""A decoder: tokens in, logits of the next token out."""
import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.kernels.distill_loss.api import Head
from lean_jax.models.cache import empty_cache
from lean_jax.models.config import StackConfig
from lean_jax.models.stack import Stack
from lean_jax.nn.linear import Linear
from lean_jax.weights import Dense

__all__ = ['Decoder', 'DecoderConfig', 'empty_cache']


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
  """The hyper-parameters of a decoder.

  Attributes:
    tied: whether the output head is the embedding's transpose.
    head_bias: whether the head has a bias.
    logit_softcap: logits become softcap * tanh(logits / softcap); None leaves them.
    logit_scale: what logits are multiplied by.
  """
  tied: bool = True
  head_bias: bool = False
  logit_softcap: float | None = None
  logit_scale: float = 1.

  @property
  def module(self):
    """The Linen module."""
    return Decoder(self)


class Decoder(Stack):
  """A stack of layers and an output head."""
  config: DecoderConfig
  inputs = ('tokens',)          # what a call cannot do without

  def setup(self):
    super().setup()
    c = self.config
    if c.embedding_width not in (None, c.width):
      self.embed_out = Linear('btd,df->btf', (c.width, c.embedding_width), ('embed', None), c.dtype)
    if not c.tied:
      self.head = Linear('btd,dv->btv', (c.embedding_width or c.width, c.vocabulary),
                         ('embed', 'vocab'), c.dtype, c.head_bias)
    elif c.head_bias:
      self.head_bias = self.param('head_bias', nn.initializers.zeros, (c.vocabulary,))

  def __call__(self, tokens, cache=None, offset=0, mask=None, segments=None):
    """Logits of the token after each.

    Args:
      tokens: [B T], integer.
      cache: None, or what `empty_cache` or an earlier call gave.
      offset: how many tokens the cache holds; scalar.
      mask: [B T] bool, which tokens are real; None for all.
      segments: as of `hidden`.

    Returns:
      logits [B T V] float32, and the cache (None without one).
    """
    x, cache = self.hidden(tokens, cache, offset, mask, segments=segments)
    return self.logits(x), cache

  def head_of(self, params):
    """What `logits` multiplies by: (matrix, Head); None where logits are more than its product.

    A head that is not of floats has its own product, which this does not give either.
    """
    c = self.config
    if c.head_bias or c.embedding_width not in (None, c.width):
      return None
    w = params['embed']['table'] if c.tied else params['head']['kernel']
    return (w.value, Head(c.tied, c.logit_scale, c.logit_softcap)) if isinstance(w, Dense) else None

  def logits(self, x):
    """Logits [B T V], float32, of `hidden`'s output."""
    c = self.config
    if c.embedding_width not in (None, c.width):
      x = self.embed_out(x)
    y = (self.embed.attend(x) if c.tied else self.head(x)).astype(jnp.float32)
    if c.tied and c.head_bias:
      y = y + self.head_bias.astype(jnp.float32).reshape(1, 1, -1)
    y = y if c.logit_scale == 1 else y * c.logit_scale
    if c.logit_softcap is not None:
      y = c.logit_softcap * jnp.tanh(y / c.logit_softcap)
    return nn.with_logical_constraint(y, ('batch', 'length', 'vocab'))
