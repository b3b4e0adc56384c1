"""Text from a model."""
from lean_jax.generate.continuation import generate

__all__ = ['generate']
