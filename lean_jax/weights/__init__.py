"""The kinds of weights. A new kind is one file and one line here."""
from lean_jax.weights.adapter import Adapter, bare
from lean_jax.weights.base import Weight, Wrapper
from lean_jax.weights.beside import Bottleneck, DeepPrefix, Prefix, Prompt
from lean_jax.weights.dense import Dense
from lean_jax.weights.fake_quantized import FakeQuantized
from lean_jax.weights.learned_step import LearnedStep
from lean_jax.weights.low_rank import LowRank
from lean_jax.weights.magnitude import Magnitude
from lean_jax.weights.outliers import Outliers
from lean_jax.weights.prepared import Prepared
from lean_jax.weights.quantized import Quantized
from lean_jax.weights.rescaled import Rescaled
from lean_jax.weights.scaled import Scaled
from lean_jax.weights.several import Several
from lean_jax.weights.trained import Trained
from lean_jax.weights.vectors import Vectors

KINDS = (Dense, Quantized, FakeQuantized, LearnedStep, LowRank, Several, Magnitude, Vectors,
         Scaled, Rescaled, Outliers, Prepared, Bottleneck, DeepPrefix, Prefix, Prompt)

__all__ = ['KINDS', 'Adapter', 'Bottleneck', 'DeepPrefix', 'Dense', 'FakeQuantized', 'LearnedStep',
           'LowRank', 'Magnitude', 'Outliers', 'Prefix', 'Prepared', 'Prompt', 'Quantized',
           'Rescaled', 'Scaled', 'Several', 'Trained', 'Vectors', 'Weight', 'Wrapper', 'bare']
