"""Models with states on a mesh: sharded is unsharded."""
import jax
import numpy as np
import optax
import pytest

from lean_jax.objectives.language_modeling import next_token
from lean_jax.training.loop import fit
from lean_jax.training.mesh import make_mesh
from tests.models import methods_matrix as matrix


@pytest.mark.parametrize('family', [
    'mamba', pytest.param('mamba2', marks=pytest.mark.slow),
    pytest.param('lean_lstm', marks=pytest.mark.slow)])
def test_sharded_is_unsharded(family):
  config, params = matrix.model(family)
  given = matrix.batch(config)
  loss = next_token(config.module)
  run = lambda mesh: fit(loss, params, {0: given}, optax.sgd(.1), steps=1, trainable='.*',
                         mesh=mesh)[0]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(None),
               run(make_mesh(fsdp=2, tensor=2)))
