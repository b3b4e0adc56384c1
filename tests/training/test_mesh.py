"""Each axis of a mesh: what it shares, that the sums are the same, and what it cannot divide."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from lean_jax.errors import InputError
from lean_jax.models.config import Layer
from lean_jax.models.decoder import DecoderConfig
from lean_jax.nn.moe import MoEOptions
from lean_jax.nn.router import RouterOptions
from lean_jax.objectives.language_modeling import next_token
from lean_jax.training import mesh as meshes
from lean_jax.training.loop import fit

SMALL = dict(vocabulary=32, width=16, layers=2, heads=2, groups=2, head_width=8, hidden=32,
             context=16)
DENSE = DecoderConfig(**SMALL)


def mixture(**options):
  return DecoderConfig(**SMALL, kinds=(Layer(feed_forward='moe'),) * 2, moe=MoEOptions(
      experts=4, hidden=16, router=RouterOptions(balance=.01), **options))


def initial(config):
  return jax.jit(config.module.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']


class Batches:
  fingerprint = 'test'

  def __init__(self, length=16, rows=8):
    self.shape = rows, length

  def __getitem__(self, step):
    return dict(tokens=np.random.default_rng(step).integers(0, 32, self.shape).astype(np.int32))


def trained(config, batches=None, **mesh):
  return fit(next_token(config.module), initial(config), batches or Batches(), optax.sgd(.1),
             steps=2, mesh=meshes.make_mesh(**mesh))[0]


@pytest.mark.parametrize(('config', 'mesh'), [
    pytest.param(DENSE, dict(fsdp=2, sequence=4), id='sequence'),
    pytest.param(mixture(), dict(expert=4, tensor=2), id='expert'),
    pytest.param(DENSE, dict(sequence=2, tensor=2, data=2), id='sequence, tensor',
                 marks=pytest.mark.slow),
    pytest.param(mixture(capacity=4.), dict(expert=2, fsdp=2, sequence=2), id='expert, capacity',
                 marks=pytest.mark.slow),
    pytest.param(mixture(shared_hidden=16), dict(expert=2, sequence=2, tensor=2),
                 id='expert, sequence', marks=pytest.mark.slow)])
def test_sharded_is_unsharded(config, mesh):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained(config),
               trained(config, **mesh))


def test_experts_are_really_shared():
  mesh = meshes.make_mesh(expert=4, fsdp=2)
  shapes = jax.eval_shape(lambda: initial(mixture()))
  where = meshes.shardings(shapes, mesh)['layers']['moe']['experts']['up']['kernel'].value
  assert where.spec == PartitionSpec(None, 'expert', 'fsdp', 'tensor')
  with meshes.on(mesh):
    text = jax.jit(lambda p, t: DENSE.module.apply({'params': p}, t)[0]).lower(
        initial(DENSE), jnp.zeros((8, 16), jnp.int32)).as_text()
  assert '"sequence"' in text


@pytest.mark.parametrize(('config', 'mesh', 'batches', 'match'), [
    (DENSE, dict(expert=2), None, 'mesh.expert=2 shares no weight: no weight has such an axis'),
    (mixture(), dict(expert=8), None, r'mesh.expert=8 shares no weight: it divides none of .*(4,'),
    (DENSE, dict(fsdp=3), None, 'mesh.fsdp=3 shares no weight: it divides none of '),
    (DENSE, dict(sequence=3), None, '16 tokens do not divide over mesh.sequence=3'),
    (DENSE, dict(data=2, fsdp=2), Batches(rows=6), '6 rows .* does not divide over data x fsdp'),
    (DENSE, dict(sequence=16), None, 'needs 16 devices, there are 8; lower mesh.sequence')])
def test_a_mesh_that_divides_nothing_is_one_line(config, mesh, batches, match):
  with pytest.raises(InputError, match=match.replace('(4,', r'\(.*4,')) as caught:
    trained(config, batches, **mesh)
  assert '\n' not in str(caught.value)
