"""The step of `fit`, of arrays that nobody has: what it is compiled from ahead of time."""
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lean_jax import tree
from lean_jax.training import loop
from lean_jax.training import mesh as meshes


def placed(params, mesh):
  """A tree of shapes, each where its weight's names put it on a mesh."""
  return _at(params, meshes.shardings(params, mesh))


def traced(loss_fn, params, tx, batch, mesh, *, trainable='.*', frozen=None, accumulate=1,
           watched=loop.STOPS):
  """The traced step, and its arguments, as ShapeDtypeStructs.

  Args:
    loss_fn, tx, trainable, accumulate, watched: as of `fit`.
    params, frozen: as of `fit`, arrays or shapes; nothing is computed.
    batch: {name: (shape, dtype)}, of all hosts.
    mesh: of `meshes.make_mesh`, of devices that need not be there.
  """
  meshes.check(params, mesh)
  params = placed(params, mesh)
  frozen = {k: placed(t, mesh) for k, t in (frozen or {}).items()}
  train, rest = tree.split(params, trainable)
  opt = jax.eval_shape(tx.init, train)
  opt = _at(opt, meshes.of_optimizer(opt, train, jax.tree.map(lambda x: x.sharding, train), mesh))
  whole = NamedSharding(mesh, PartitionSpec())
  of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
  recent = None if watched.spike is None else of((loop.RECENT,), jnp.float32)
  state = loop.State(train, opt, recent)
  rows = {k: meshes.batch_shape(k, shape, dtype, mesh) for k, (shape, dtype) in batch.items()}
  key = of((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
  update = loop.compiled(loss_fn, tx, accumulate, watched, state)
  given = state, rest, frozen, rows, key, of((), jnp.int32)
  with meshes.on(mesh):
    return update.trace(*given), given


def _at(shapes, where):
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                      where)
