"""`python -m lean_jax` is `lean-jax`."""
import sys

from lean_jax.cli import main

if __name__ == '__main__':
  sys.exit(main())
