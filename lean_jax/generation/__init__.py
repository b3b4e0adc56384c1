"""Text from a model."""
from lean_jax.generation.continuation import generate

__all__ = ['generate']
