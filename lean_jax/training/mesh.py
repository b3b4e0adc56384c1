"""Meshes, and where on them each array lives."""
import contextlib
import math

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lean_jax.errors import InputError
from lean_jax.tree import is_weight

AXES = ('data', 'fsdp', 'tensor')

# Logical axis of weights and activations -> axis of the mesh.
RULES = (('batch', ('data', 'fsdp')), ('length', None), ('embed', 'fsdp'), ('heads', 'tensor'),
         ('mlp', 'tensor'), ('vocab', 'tensor'), ('experts', None), ('layers', None))


def make_mesh(data=1, fsdp=1, tensor=1):
  """A mesh of data x fsdp x tensor devices; the product is the number of devices used.

  Raises:
    InputError: an axis is not positive, or there are fewer devices.
  """
  shape = (data, fsdp, tensor)
  wanted = math.prod(shape)
  if min(shape) < 1:
    raise InputError(f'mesh {dict(zip(AXES, shape))} has an axis below 1; expected sizes of at '
                     'least 1')
  if wanted > jax.device_count():
    raise InputError(f'mesh {dict(zip(AXES, shape))} needs {wanted} devices, there are '
                     f'{jax.device_count()}; lower mesh.data, mesh.fsdp or mesh.tensor')
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3,
                       devices=jax.devices()[:wanted])


@contextlib.contextmanager
def on(mesh: Mesh):
  """Inside, the blocks' logical constraints hold on `mesh`."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


@contextlib.contextmanager
def of(params):
  """Inside, `on` the mesh of several devices that arrays of a tree are on, if they are on one."""
  mesh = _mesh_of(params)
  with contextlib.nullcontext() if mesh is None or mesh.size == 1 else on(mesh):
    yield


def shardings(params, mesh):
  """For each array of a tree of weights its NamedSharding; other arrays are replicated."""
  def one(w):
    if not is_weight(w):
      return NamedSharding(mesh, PartitionSpec())
    at_names = lambda t: isinstance(t, tuple) and all(n is None or isinstance(n, str) for n in t)
    return jax.tree.map(lambda names, x: _sharding(names, x.shape, mesh), w.names(), w,
                        is_leaf=at_names)
  return jax.tree.map(one, params, is_leaf=is_weight)


def placed(params, like):
  """A tree of weights made of another, each array where its weight's names put it on the mesh of
  that one's arrays; as it is where they are on no mesh.
  """
  mesh = _mesh_of(like)
  return params if mesh is None else jax.device_put(params, shardings(params, mesh))


def of_optimizer(opt, params, where, mesh):
  """Shardings of an optimizer's state: a moment lives where its parameter does.

  A state's array belongs to the parameter whose path ends its own.
  """
  by_path = {jax.tree_util.keystr(path): (x.shape, s) for (path, x), s in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(where))}

  def one(path, x):
    for k in range(len(path)):
      shape, sharding = by_path.get(jax.tree_util.keystr(path[k:]), (None, None))
      if shape == x.shape:
        return sharding
    return NamedSharding(mesh, PartitionSpec())
  return jax.tree_util.tree_map_with_path(one, opt)


def batch_sharding(mesh):
  """Rows of a batch over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def put_batch(batch, mesh):
  """The host's rows of a batch as global arrays.

  Raises:
    InputError: the mesh does not divide the rows.
  """
  sharding = batch_sharding(mesh)
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  for key, x in batch.items():
    if x.shape[0] * jax.process_count() % ways:
      raise InputError(f'a batch of {x.shape[0] * jax.process_count()} rows ({key}) does not '
                       f'divide over data x fsdp = {ways} devices; change the batch or the mesh')
  return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


def _mesh_of(params):
  """The mesh of `make_mesh` that arrays of a tree are on, or None."""
  mesh = next((x.sharding.mesh for x in jax.tree.leaves(params)
               if isinstance(getattr(x, 'sharding', None), NamedSharding)), None)
  return None if mesh is None or not set(AXES) <= set(mesh.axis_names) else mesh


def _sharding(names, shape, mesh):
  """An axis that its part of the mesh does not divide stays whole."""
  rules = dict(RULES)
  spec = []
  for name, n in zip(names, shape):
    axis = rules.get(name)
    spec.append(axis if axis and n % mesh.shape[axis] == 0 else None)
  return NamedSharding(mesh, PartitionSpec(*spec))
