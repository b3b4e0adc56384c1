"""The version, where the package's metadata and its reports find it without importing jax."""

__version__ = '0.1.0'
