"""A call of an op's api, once compiled, is a call of its kernel."""
import jax.numpy as jnp
import pytest

from benchmarks import call_overhead
from lean_jax.kernels.native import library


@pytest.mark.skipif(library.why_not() is not None, reason=f'the kernels: {library.why_not()}')
def test_the_program_of_the_api_is_that_of_the_kernel():
  for name, (api, kernel, arrays) in call_overhead.pairs(128).items():
    ours, bare = (call_overhead.program(f, jnp.ones((2, 128)), *arrays) for f in (api, kernel))
    assert ours == bare and any('custom-call' in line for line in ours), name
