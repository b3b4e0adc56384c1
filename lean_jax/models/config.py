"""What a stack of layers is: its hyper-parameters, and what each layer is."""
import dataclasses
from typing import Any

from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions
from lean_jax.nn.pooling import Pooling
from lean_jax.nn.relative import RelativeOptions
from lean_jax.nn.rope_scaling import LongRope
from lean_jax.nn.rounded import Rounding


@dataclasses.dataclass(frozen=True)
class Layer:
  """What one layer is.

  Attributes:
    mixer: a name of `kinds.MIXERS`.
    feed_forward: a name of `kinds.FEED_FORWARDS`; None for none.
    window: how many keys on each side a query sees, its own included; None is all.
    rotary: which of the config's ropes its attention uses.
    mixer_norm: False leaves the mixer's input as it is where `norm_before` would normalise it.
  """
  mixer: str = 'attention'
  feed_forward: str | None = 'mlp'
  window: int | None = None
  rotary: int = 0
  mixer_norm: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
  """The hyper-parameters of a stack.

  Attributes:
    vocabulary: V, tokens.
    width: D, of the residual stream.
    layers: N.
    heads, groups: H query heads, G key and value heads; G divides H.
    head_width: K, of a head.
    hidden: F, of the feed-forward block.
    context: the longest sequence, in tokens.
    kinds: what each layer is; () is attention and MLP in all.
    attention, mlp: options of these blocks.
    moe, latent, mamba, mamba2, lstm: options of blocks that the kinds name; None where they name
      none.
    norm: 'rms' or 'layer'; epsilon, norm_offset, norm_bias and norm_scale are its own.
    norm_before, norm_after, norm_sum: whether a branch normalises its input, its output, and the
      sum with what it is added to.
    parallel: whether both branches see the layer's input; shared_norm: by one norm.
    final_norm: whether there is a norm after the last layer.
    embedding_scale: what embeddings are multiplied by.
    embedding_width: of the table; None is D, another is brought to D by a product.
    embedding_norm: whether embeddings are normalised.
    positions: rows of the table of learned positions, 0 for none; position_offset: of the first.
    token_types: rows of the table of token types (segments), 0 for none.
    relative: learned scores of distances, which all layers add to attention's; None for none.
    causal: whether a token sees only those before it.
    cross: whether each layer attends to an encoder's output too.
    pooling: how a text's vector is made of hidden states; None where nothing says.
    cache: how keys and values of a text are kept while it is written; None is as they are.
    dtype: of activations and products; parameters are float32.
    remat: whether the backward pass recomputes each layer: less memory, more time.
    scan_layers: whether layers of one kind are stacked.
  """
  vocabulary: int
  width: int
  layers: int
  heads: int = 1
  groups: int = 1
  head_width: int = 0
  hidden: int = 0
  context: int
  kinds: tuple[Layer, ...] = ()
  attention: AttentionOptions = AttentionOptions()
  mlp: MLPOptions = MLPOptions()
  moe: Any = None
  latent: Any = None
  mamba: Any = None
  mamba2: Any = None
  lstm: Any = None
  norm: str = 'rms'
  epsilon: float = 1e-5
  norm_offset: float = 0.
  norm_bias: bool = True
  norm_scale: bool = True
  norm_before: bool = True
  norm_after: bool = False
  norm_sum: bool = False
  parallel: bool = False
  shared_norm: bool = False
  final_norm: bool = True
  embedding_scale: float = 1.
  embedding_width: int | None = None
  embedding_norm: bool = False
  positions: int = 0
  position_offset: int = 0
  token_types: int = 0
  relative: RelativeOptions | None = None
  causal: bool = True
  cross: bool = False
  pooling: Pooling | None = None
  cache: Rounding | None = None
  dtype: str = 'float32'
  remat: bool = False
  scan_layers: bool = True

  @property
  def each(self):
    """The Layer of each layer."""
    return self.kinds or (Layer(),) * self.layers

  @property
  def stacks(self):
    """{where in the tree of parameters: the config of the stack there}."""
    return {'': self}

  @property
  def decoding(self):
    """The config of the stack that a cache is of."""
    return self

  @property
  def renewals(self):
    """Lengths past which all positions turn by other angles (LongRoPE): a cache is then stale."""
    scalings = [rope.scaling for rope in self.attention.ropes]
    return sorted({s.original for s in scalings if isinstance(s, LongRope)})
