"""lean_jax: large language models made lean, in JAX."""
from lean_jax.version import __version__

__all__ = ['__version__']
