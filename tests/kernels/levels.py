"""Levels of instructions, as a test's parameter; those that this CPU lacks are skipped."""
import pytest

from lean_jax.kernels.native import library

_MOST = library.LEVELS.index(library.level()) if library.why_not() is None else -1
EACH = pytest.mark.parametrize('level', [
    pytest.param(k, id=name, marks=pytest.mark.skipif(
        k > _MOST, reason=f'the native kernels: {library.why_not() or f"no {name} here"}'))
    for k, name in enumerate(library.LEVELS)])
