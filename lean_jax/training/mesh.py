"""Meshes, and where on them each array lives."""
import contextlib
import math

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lean_jax.errors import InputError
from lean_jax.tree import is_weight, named_weights

AXES = ('data', 'fsdp', 'expert', 'sequence', 'tensor')
ROWS = ('data', 'fsdp', 'expert')      # that spread the rows of a batch

# Logical axis of weights and activations -> axis of the mesh.
RULES = (('batch', ROWS), ('length', 'sequence'), ('embed', 'fsdp'), ('heads', 'tensor'),
         ('mlp', 'tensor'), ('vocab', 'tensor'), ('experts', 'expert'), ('layers', None))


def make_mesh(data=1, fsdp=1, tensor=1, expert=1, sequence=1, *, devices=None):
  """A mesh whose axes' product is the number of devices used; on several hosts, of all devices.

  Args:
    data: copies of the model, each with its rows of a batch.
    fsdp: devices that share each weight, gathered where it is used; each has its own rows too.
    tensor: devices that multiply by parts of a weight.
    expert: devices that share the experts of a mixture; each has its own rows too.
    sequence: devices that share the tokens of a row.
    devices: to choose from; None is all there are.

  Raises:
    InputError: an axis is not positive, there are fewer devices, or hosts without any.
  """
  shape = dict(data=data, fsdp=fsdp, expert=expert, sequence=sequence, tensor=tensor)
  wanted, of = math.prod(shape.values()), devices if devices is not None else jax.devices()
  said = {k: n for k, n in shape.items() if n != 1}
  if min(shape.values()) < 1:
    raise InputError(f'mesh {said} has an axis below 1; expected sizes of at least 1')
  if wanted > len(of):
    raise InputError(f'mesh {said} needs {wanted} devices, there are {len(of)}; lower '
                     + ', '.join(f'mesh.{k}' for k in said))
  if devices is None and jax.process_count() > 1 and wanted != len(of):
    raise InputError(f'mesh {said} uses {wanted} of the {len(of)} devices of '
                     f'{jax.process_count()} hosts; use all of them, or fewer hosts')
  return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                       devices=of[:wanted])


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


def check(params, mesh):
  """Returns if each axis of the mesh that is to share weights divides at least one.

  Raises:
    InputError: an axis of several devices shares nothing: all of them would compute the same.
  """
  spread = {axis for s in jax.tree.leaves(shardings(params, mesh)) for axis in s.spec if axis}
  for axis in ('fsdp', 'expert', 'tensor'):
    names = [logical for logical, at in RULES if at == axis]
    found = {f'{name} {w.shape}' for name, w in named_weights(params).items()
             if set(names) & set(jax.tree.leaves(w.names()))}
    if mesh.shape[axis] > 1 and axis not in spread:
      said = (f'it divides none of {", ".join(sorted(found)[:3])}' if found else
              'no weight has such an axis')
      raise InputError(f'mesh.{axis}={mesh.shape[axis]} shares no weight: {said}; give a size that '
                       'divides, or 1')


def put(tree, where):
  """Arrays of a tree where a tree of shardings says.

  What every host has a copy of becomes one array of all hosts.
  """
  def one(x, s):
    if s.is_fully_addressable or not getattr(x, 'is_fully_addressable', True):
      return jax.device_put(x, s)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = one(jax.random.key_data(x), NamedSharding(s.mesh, PartitionSpec()))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, s, lambda index: host[index])
  return jax.tree.map(one, tree, where)


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
  """Rows of a batch over the axes of `ROWS`."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def put_batch(batch, mesh):
  """A whole batch, which every host has, as arrays on the mesh.

  Raises:
    InputError: the mesh does not divide the rows, or their tokens.
  """
  return {k: _spread(np.asarray(x), len(x), np.arange(len(x)), k, mesh) for k, x in batch.items()}


def step_batch(batches, step, mesh):
  """A step's batch as arrays on the mesh.

  Args:
    batches: `batches[step]` is the whole batch, {name: array of rows}. If it has `part`, and
      `batch`, the number of rows, then `part(step, rows)` is asked for the rows alone that devices
      of this host hold; so a batch is the same on any number of hosts.

  Raises:
    InputError: as of `put_batch`.
  """
  if not hasattr(batches, 'part'):
    return put_batch(batches[step], mesh)
  sharding = batch_sharding(mesh)
  _check_rows(batches.batch, 'the batch', mesh)
  parts = sharding.addressable_devices_indices_map((batches.batch,)).values()
  rows = np.unique(np.concatenate([np.arange(batches.batch)[index] for index in parts]))
  return {k: _spread(x, batches.batch, rows, k, mesh)
          for k, x in batches.part(step, rows).items()}


def batch_shape(name, shape, dtype, mesh):
  """A batch's array of a shape, on the mesh, as a ShapeDtypeStruct.

  Raises:
    InputError: the mesh does not divide its rows, or their tokens.
  """
  _check_rows(shape[0], name, mesh)
  if len(shape) > 1 and shape[1] % mesh.shape['sequence']:
    raise InputError(f'{name}: {shape[1]} tokens do not divide over mesh.sequence='
                     f'{mesh.shape["sequence"]}; change the length or the mesh')
  return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def _spread(x, count, rows, name, mesh):
  """The global array of `count` rows of which this host has x, those of the numbers `rows`."""
  like = batch_shape(name, (count, *x.shape[1:]), x.dtype, mesh)
  at = {int(row): k for k, row in enumerate(rows)}

  def part(index):
    own = [at[r] for r in range(*index[0].indices(count))]
    return x[own][(slice(None), *index[1:])]
  return jax.make_array_from_callback(like.shape, like.sharding, part)


def _check_rows(count, name, mesh):
  ways = math.prod(mesh.shape[axis] for axis in ROWS)
  if count % ways:
    raise InputError(f'a batch of {count} rows ({name}) does not divide over '
                     f'{" x ".join(ROWS)} = {ways} devices; change the batch or the mesh')


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
