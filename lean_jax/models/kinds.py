"""The kinds of blocks that a layer can be made of, by name. A new one is one line here."""
from collections.abc import Callable
from typing import NamedTuple

from lean_jax.nn import attention, latent, lstm, mamba, mamba2
from lean_jax.nn.mlp import MLP
from lean_jax.nn.moe import MoE


class Mixer(NamedTuple):
  """A module that mixes a sequence's tokens, and what it keeps while generating."""
  module: Callable
  state_shapes: Callable


MIXERS = dict(
    attention=Mixer(attention.Attention, attention.state_shapes),
    latent=Mixer(latent.LatentAttention, latent.state_shapes),
    mamba=Mixer(mamba.Mamba, mamba.state_shapes),
    mamba2=Mixer(mamba2.Mamba2, mamba2.state_shapes),
    lstm=Mixer(lstm.LSTM, lstm.state_shapes),
)
FEED_FORWARDS = dict(
    mlp=MLP,
    moe=MoE,
)
