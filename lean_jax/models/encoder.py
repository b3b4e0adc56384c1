"""An encoder: tokens in, the logits of a head out, or the last hidden states."""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.models.config import StackConfig
from lean_jax.models.stack import Stack
from lean_jax.nn.linear import Linear
from lean_jax.nn.mlp import ACTIVATIONS
from lean_jax.nn.norm import norm
from lean_jax.nn.pooling import pooled


@dataclasses.dataclass(frozen=True)
class TransformOptions:
  """What a head computes before its last product: f(x W + b), normalised or not.

  Attributes:
    activation: f, a name of `mlp.ACTIVATIONS`.
    bias: whether there is b.
    norm: whether the result is normalised, as the stack is.
  """
  activation: str = 'gelu'
  bias: bool = True
  norm: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
  """The hyper-parameters of an encoder.

  Attributes:
    head: what the logits are of: 'masked', the vocabulary, at each token; 'token', the labels, at
      each token; 'sequence', the labels, once; None, there are none.
    transform: comes before the head's last product, None for nothing; without a head, it makes
      `Encoder.pooled`.
    reads: where a head of sequences, or `pooled`, reads: a mode of `nn.pooling`.
    labels: their names.
    tied: whether the head of the vocabulary is the embedding's transpose.
    head_bias: whether that head has a bias; the others have.
  """
  causal: bool = False
  head: str | None = None
  transform: TransformOptions | None = None
  reads: str = 'cls'
  labels: tuple[str, ...] = ()
  tied: bool = True
  head_bias: bool = True

  @property
  def module(self):
    """The Linen module."""
    return Encoder(self)


class Encoder(Stack):
  """A stack of layers that see all tokens, and a head."""
  config: EncoderConfig
  inputs = ('tokens',)          # what a call cannot do without

  def setup(self):
    super().setup()
    c = self.config
    if c.transform is not None:
      self.transform = Transform(c)
    if c.head == 'masked' and not c.tied:
      self.head = Linear('btd,dv->btv', (c.width, c.vocabulary), ('embed', 'vocab'), c.dtype,
                         c.head_bias)
    elif c.head == 'masked' and c.head_bias:
      self.head_bias = self.param('head_bias', nn.initializers.zeros, (c.vocabulary,))
    elif c.labels:
      self.classifier = Linear('btd,dv->btv', (c.width, len(c.labels)), ('embed', None), c.dtype,
                               True)

  def __call__(self, tokens, mask=None, token_types=None):
    """The head's logits, or without a head the last hidden states.

    Args:
      tokens: [B T], integer.
      mask: [B T] bool, which tokens are real; None for all. Positions count real tokens.
      token_types: [B T], integer; None is type 0.

    Returns:
      [B T V], [B T labels], [B labels] or [B T D], float32; and None, where a decoder has a cache.
    """
    x, _ = self.hidden(tokens, mask=mask, token_types=token_types)
    if self.config.head is None and self.is_initializing():
      self.pooled(x, mask)                                     # makes its parameters
    return self.logits(x, mask), None

  def logits(self, x, mask=None):
    """What a call gives, of `hidden`'s output."""
    c = self.config
    if c.head is None:
      return x.astype(jnp.float32)
    if c.head == 'sequence':
      x = self._read(x, mask)
    if c.transform is not None:
      x = self.transform(x)
    if c.head != 'masked':
      y = self.classifier(x).astype(jnp.float32)
      return y[:, 0] if c.head == 'sequence' else y
    y = (self.embed.attend(x) if c.tied else self.head(x)).astype(jnp.float32)
    if c.tied and c.head_bias:
      y = y + self.head_bias.astype(jnp.float32).reshape(1, 1, -1)
    return nn.with_logical_constraint(y, ('batch', 'length', 'vocab'))

  def pooled(self, x, mask=None):
    """The vector of each row that the pooler makes of `hidden`'s output, [B D] float32."""
    x = self._read(x, mask)
    x = x if self.config.transform is None else self.transform(x)
    return x[:, 0].astype(jnp.float32)

  def _read(self, x, mask):
    return pooled(x, mask, (self.config.reads,))[:, None]      # [B 1 D]


class Transform(nn.Module):
  """What comes before a head's last product; see `TransformOptions`."""
  config: Any

  @nn.compact
  def __call__(self, x):
    """[B T D] of x [B T D]."""
    c, o = self.config, self.config.transform
    x = Linear('btd,df->btf', (c.width, c.width), ('embed', None), c.dtype, o.bias,
               name='dense')(x)
    x = ACTIVATIONS[o.activation](x)
    return norm(c, 'norm')(x) if o.norm else x
