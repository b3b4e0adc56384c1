"""An encoder and a decoder that attends to it: a source and the target's beginning in, logits of
the target's next token out."""
import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.models.config import StackConfig
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.models.stack import Stack
from lean_jax.nn.linear import Embedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
  """The hyper-parameters of an encoder and a decoder, which share their table of embeddings.

  Attributes:
    encoder: not causal; its context is that of sources.
    decoder: with `cross`; its vocabulary, width and dtype are the encoder's.
    start: the token that a target begins with.
    first: the token that always follows it; None where the model chooses.
    last: the token that ends a target that is as long as was asked; None where the model chooses.
  """
  encoder: StackConfig
  decoder: DecoderConfig
  start: int
  first: int | None = None
  last: int | None = None

  vocabulary = property(lambda self: self.decoder.vocabulary)
  width = property(lambda self: self.decoder.width)
  context = property(lambda self: self.decoder.context)
  dtype = property(lambda self: self.decoder.dtype)
  remat = property(lambda self: self.decoder.remat)
  scan_layers = property(lambda self: self.decoder.scan_layers)
  tied = property(lambda self: self.decoder.tied)

  @property
  def module(self):
    """The Linen module."""
    return EncoderDecoder(self)

  @property
  def stacks(self):
    """{where in the tree of parameters: the config of the stack there}."""
    return {'encoder/': self.encoder, 'decoder/': self.decoder}

  @property
  def decoding(self):
    """The config of the stack that a cache is of."""
    return self.decoder


class EncoderDecoder(nn.Module):
  """A stack that reads a source, and one that writes a target."""
  config: EncoderDecoderConfig
  inputs = ('tokens', 'decoder_tokens')       # what a call cannot do without

  def setup(self):
    c = self.config
    self.embed = Embedding(c.vocabulary, c.width, c.dtype)
    self.encoder = Stack(c.encoder, self.embed)
    self.decoder = Decoder(c.decoder, self.embed)

  def __call__(self, tokens, decoder_tokens, mask=None, decoder_mask=None, cache=None, offset=0):
    """Logits of the target's token after each.

    Args:
      tokens: [B S], the source; None where the cache has what the decoder attends to.
      decoder_tokens: [B T], the target or its next part, the start token first.
      mask: [B S] bool, which tokens of the source are real; None for all.
      decoder_mask: [B T] bool, the same of the target.
      cache: None, or what `empty_cache` or an earlier call gave.
      offset: how many tokens of the target the cache holds; scalar.

    Returns:
      logits [B T V] float32, and the cache (None without one).
    """
    encoded = None if tokens is None else self.encode(tokens, mask)
    x, cache = self.hidden(decoder_tokens, cache, offset, decoder_mask, encoded, mask)
    return self.logits(x), cache

  def encode(self, tokens, mask=None):
    """The encoder's output [B S D] of a source [B S]; the mask is True where it is real.

    It is [B P+S D] where a soft prompt of P stands before every source.
    """
    prompt = None if self.is_initializing() else self.encoder.variables['params'].get('prompt')
    if prompt is not None:
      return self.encoder.prompted(prompt, tokens, mask)
    return self.encoder.hidden(tokens, mask=mask)[0]

  def hidden(self, tokens, cache=None, offset=0, mask=None, encoded=None, encoded_mask=None):
    """The decoder's output [B T D] of a target's tokens [B T], and the cache.

    Args:
      tokens, cache, offset, mask: as `Decoder` takes them, of the target.
      encoded: [B S D], from `encode`; None where the cache has its keys and values.
      encoded_mask: [B S] bool, which tokens of the source are real; None for all. What stands
        before a source is.
    """
    if encoded is not None and encoded_mask is not None:
      more = encoded.shape[1] - encoded_mask.shape[1]
      encoded_mask = jnp.pad(encoded_mask.astype(bool), ((0, 0), (more, 0)), constant_values=True)
    return self.decoder.hidden(tokens, cache, offset, mask, cross=encoded, cross_mask=encoded_mask)

  def logits(self, x):
    """Logits [B T V], float32, of `hidden`'s output."""
    return self.decoder.logits(x)
