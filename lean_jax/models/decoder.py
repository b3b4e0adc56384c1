"""A decoder: tokens in, logits of the next token out."""
import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lean_jax.nn.attention import Attention
from lean_jax.nn.linear import Embedding, Linear
from lean_jax.nn.mlp import GatedMLP
from lean_jax.nn.norm import RMSNorm
from lean_jax.nn.rope import rotation

UNROLL = 4                    # layers in the scan's body: on a CPU the loop itself costs a fifth


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The hyper-parameters of a decoder.

  Attributes:
    vocabulary: V, tokens.
    width: D, of the residual stream.
    layers: N.
    heads, groups: H query heads, G key and value heads; G divides H.
    head_width: K, of a head; even.
    hidden: F, of the feed-forward block.
    context: the longest sequence, in tokens.
    rope_theta: base of the rotary frequencies.
    epsilon: of the norms.
    tied: whether the output head is the embedding's transpose.
    dtype: of activations and products; parameters are float32.
    remat: whether the backward pass recomputes each layer: less memory, more time.
  """
  vocabulary: int
  width: int
  layers: int
  heads: int
  groups: int
  head_width: int
  hidden: int
  context: int
  rope_theta: float = 10_000.
  epsilon: float = 1e-5
  tied: bool = True
  dtype: str = 'float32'
  remat: bool = False


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""
  config: DecoderConfig

  @nn.compact
  def __call__(self, x, cache, cos, sin, mask, offset):
    c = self.config
    x = nn.with_logical_constraint(x, ('batch', 'length', None))
    norm = lambda name: RMSNorm(c.epsilon, c.dtype, name=name)
    y, cache = Attention(c.heads, c.groups, c.head_width, c.dtype, name='attention')(
        norm('attention_norm')(x), cos, sin, mask, cache, offset)
    x = x + y
    x = x + GatedMLP(c.hidden, c.dtype, name='mlp')(norm('mlp_norm')(x))
    self.sow('taps', 'hidden', x)
    return x, cache


class Decoder(nn.Module):
  """A stack of blocks under nn.scan: parameters of layers stacked, one block compiled."""
  config: DecoderConfig

  def setup(self):
    c = self.config
    block = nn.remat(Block, prevent_cse=False) if c.remat else Block
    self.embed = Embedding(c.vocabulary, c.width, c.dtype)
    self.layers = nn.scan(
        block, variable_axes={'params': 0, 'taps': 0}, split_rngs={'params': True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast), length=c.layers,
        unroll=1 if self.is_initializing() else min(c.layers, UNROLL),
        metadata_params={nn.PARTITION_NAME: 'layers'})(c)
    self.norm = RMSNorm(c.epsilon, c.dtype)
    if not c.tied:
      self.head = Linear('btd,dv->btv', (c.width, c.vocabulary), ('embed', 'vocab'), c.dtype)

  def __call__(self, tokens, cache=None, offset=0):
    """Logits of the token after each.

    Args:
      tokens: [B T], integer.
      cache: None, or what `empty_cache` or an earlier call gave.
      offset: how many tokens the cache holds; scalar.

    Returns:
      logits [B T V] float32, and the cache (None without one).
    """
    x, cache = self.hidden(tokens, cache, offset)
    return self.logits(x), cache

  def hidden(self, tokens, cache=None, offset=0):
    """The last layer's output after the final norm, [B T D], and the cache."""
    _, T = tokens.shape
    S = T if cache is None else cache['k'].shape[2]
    at = offset + jnp.arange(T)
    mask = at[:, None] >= jnp.arange(S)[None, :]                # [T S]
    cos, sin = rotation(at, self.config.head_width, self.config.rope_theta)
    x = nn.with_logical_constraint(self.embed(tokens), ('batch', 'length', None))
    x, cache = self.layers(x, cache, cos, sin, mask, offset)
    return self.norm(x), cache

  def logits(self, x):
    """Logits [B T V], float32, of `hidden`'s output."""
    y = self.embed.attend(x) if self.config.tied else self.head(x)
    return nn.with_logical_constraint(y.astype(jnp.float32), ('batch', 'length', 'vocab'))


def empty_cache(config, batch, length, dtype: Any = None):
  """Room for the keys and values of `length` tokens: dict(k, v) of [N B S G K], zeros."""
  shape = (config.layers, batch, length, config.groups, config.head_width)
  return dict(k=jnp.zeros(shape, dtype or config.dtype), v=jnp.zeros(shape, dtype or config.dtype))
