"""The kinds of weights. A new kind is one file and one line here."""
from lean_jax.weights.base import Weight, Wrapper
from lean_jax.weights.dense import Dense
from lean_jax.weights.fake_quantized import FakeQuantized
from lean_jax.weights.low_rank import LowRank
from lean_jax.weights.quantized import Quantized

KINDS = (Dense, Quantized, FakeQuantized, LowRank)

__all__ = ['KINDS', 'Dense', 'FakeQuantized', 'LowRank', 'Quantized', 'Weight', 'Wrapper']
