"""int8_matmul's GPU kernel in Mosaic GPU's interpreter."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from lean_jax.kernels.int8_matmul import gpu


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='the interpreter came with JAX 0.11')
@pytest.mark.parametrize(('M', 'N', 'K'), [(5, 40, 128), (130, 200, 300), (128, 128, 768)])
def test_sums_are_exact_whatever_fills_blocks(M, N, K):
  rng = np.random.default_rng(M)
  codes, values = (rng.integers(-127, 128, s).astype(np.int8) for s in ((M, K), (N, K)))
  rows, columns = (rng.uniform(.1, 1, n).astype(np.float32) for n in (M, N))
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = gpu.scaled_product(*map(jnp.asarray, (codes, values, rows, columns)))
  sums = codes.astype(np.int64) @ values.T.astype(np.int64)
  # two float32 roundings after an exact sum
  np.testing.assert_allclose(got, sums * rows[:, None].astype(np.float64) * columns, rtol=3e-7)


def test_values_that_do_not_lie_along_k_are_refused():
  codes = jnp.zeros((4, 128), jnp.int8)
  with pytest.raises(ValueError, match=r'int8 \[N K\]'):
    gpu.scaled_product(codes, jnp.zeros((128, 64), jnp.int8), jnp.ones(4), jnp.ones(128))
