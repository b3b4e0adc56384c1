"""One loop for every method: a method is a loss, a tree, or a pattern of what trains."""
import functools
import inspect
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lean_jax import tree
from lean_jax.errors import InputError, NonFiniteError, Preempted
from lean_jax.training import mesh as meshes
from lean_jax.training.digest import fingerprint


def fit(loss_fn, params, batches, tx, *, steps, trainable='.*', frozen=None, mesh=None,
        accumulate=1, seed=0, hooks=(), checkpoints=None, settings=None, stop=lambda: False,
        check_every=20, rollout=None):
  """Trains the arrays of params whose names match `trainable`; the others stay as they are.

  Batch and key of a step follow from the step alone (and of a `rollout`, from the parameters then),
  so that a run resumed from a checkpoint ends with the very bits of an uninterrupted one.

  Args:
    loss_fn: (params, batch, key, **frozen) -> (scalar, {metric: scalar}), pure; one that has an
      argument `step` is given the steps done before, an int32 scalar.
    params: tree of weights and arrays; the caller's arrays are not donated.
    batches: batches[step] is this host's rows of a batch, {name: array of rows}.
    tx: optax transformation.
    steps: the step to stop at.
    trainable: a regular expression on the whole names of arrays.
    frozen: {name: tree} of what else the loss needs, a teacher's parameters say: arguments of the
      compiled step, without gradient or optimizer state.
    mesh: of `meshes.make_mesh`; one device if None.
    accumulate: microbatches a step; their rows count alike.
    seed: of the keys given to the loss.
    hooks: (steps done, metrics) -> None, after each step; metrics are device scalars.
    checkpoints: None, or a `checkpoint.Checkpoints`: its newest is resumed, and the last step is
      saved whatever its interval.
    settings: anything that JSON holds, saved with the checkpoints; a resume with other ones is
      refused.
    stop: asked after each step; True saves and raises Preempted.
    check_every: steps between looks for a NaN or an infinity; there is one before each save too.
    rollout: None, or (params, batch, key, step) -> batch, pure: what the loss is given in a batch's
      place, of the parameters before the step.

  Returns:
    params, trained; and the seconds that it took, those before a resume included.

  Raises:
    NonFiniteError: the loss or the gradient is not finite; nothing of it was saved.
    Preempted: `stop` said so.
    InputError: nothing matches `trainable`, or a checkpoint does not fit.
  """
  mesh = mesh or meshes.make_mesh()
  put = lambda t: jax.device_put(t, meshes.shardings(t, mesh))
  params = put(params)
  frozen = {k: put(t) for k, t in (frozen or {}).items()}
  train, rest = tree.split(params, trainable)
  _check_trainable(train)
  train = jax.tree.map(jnp.copy, train)                # update donates it
  opt = _optimizer_state(tx, train, mesh)
  meta = dict(seed=seed, data=getattr(batches, 'fingerprint', None), settings=settings)
  first, before, start = 0, 0., time.monotonic()
  seconds = lambda: before + time.monotonic() - start
  if checkpoints is not None:
    meta['frozen'] = fingerprint(rest)
    if checkpoints.latest() is not None:
      first, train, opt, before = _resume(checkpoints, train, opt, meta)
  # The first step that was not finite.
  bad, key = jax.device_put((jnp.full((), -1, jnp.int32), jax.random.key(seed)),
                            NamedSharding(mesh, PartitionSpec()))
  places, shape = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, (train, opt, bad)))
  update = _update(loss_fn, tx, accumulate, shape, tuple(places))

  with meshes.on(mesh):
    for step in range(first, steps):
      batch = meshes.put_batch(batches[step], mesh)
      if rollout is not None:
        batch = rollout(tree.merge(train, rest), batch, key, step)
      train, opt, bad, metrics = update(train, opt, bad, rest, frozen, batch, key,
                                        jnp.asarray(step, jnp.int32))
      done = step + 1
      stopping = stop()
      saving = checkpoints is not None and (
          stopping or done == steps or done % checkpoints.every == 0)
      if saving or done % check_every == 0 or done == steps:
        _check(int(bad), batches)
      for hook in hooks:
        hook(done, metrics)
      if saving:
        checkpoints.save(done, train, opt, dict(meta, seconds=seconds()), force=True)
      if stopping:
        if saving:
          checkpoints.wait()
        raise Preempted(f'asked to stop: stopped after step {done} of {steps}'
                        + ('; saved, the same command goes on from there' if saving else ''))
  jax.block_until_ready(train)
  if checkpoints is not None:
    checkpoints.wait()
  return tree.merge(train, rest), seconds()


@functools.lru_cache(maxsize=16)
def _update(loss_fn, tx, accumulate, shape, places):
  """The compiled step; the same loss and optimizer are compiled once a process.

  The state leaves it where it entered (`places`): a step that moved it would be compiled again.
  """
  follows = 'step' in inspect.signature(loss_fn).parameters

  @functools.partial(jax.jit, donate_argnums=(0, 1),
                     out_shardings=(*jax.tree.unflatten(shape, places), None))
  def update(train, opt, bad, rest, frozen, batch, key, step):
    def loss(train, batch, key):
      given = dict(frozen, step=step) if follows else frozen
      return loss_fn(tree.merge(train, rest), batch, key, **given)
    key = jax.random.fold_in(key, step)
    (value, metrics), grads = _gradient(loss, train, batch, key, accumulate)
    updates, opt = tx.update(grads, opt, train)
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    bad = jnp.where((bad < 0) & ~finite, step, bad)
    return optax.apply_updates(train, updates), opt, bad, dict(metrics, loss=value, grad_norm=norm)
  return update


def _gradient(loss, train, batch, key, accumulate):
  """value_and_grad of the mean over `accumulate` microbatches of consecutive rows."""
  grad = jax.value_and_grad(loss, has_aux=True)
  if accumulate == 1:
    return grad(train, batch, key)
  parts = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]),
                       batch)

  def one(total, part):
    k, micro = part
    out = grad(train, micro, jax.random.fold_in(key, k))
    return jax.tree.map(jnp.add, total, out), None
  shapes = jax.eval_shape(grad, train, jax.tree.map(lambda x: x[0], parts), key)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(one, zero, (jnp.arange(accumulate), parts))
  return jax.tree.map(lambda x: x / accumulate, total)


def _optimizer_state(tx, train, mesh):
  abstract = jax.eval_shape(tx.init, train)
  where = meshes.of_optimizer(abstract, train, jax.tree.map(lambda x: x.sharding, train), mesh)
  return jax.jit(tx.init, out_shardings=where)(train)


def _resume(checkpoints, train, opt, meta):
  """The state of the newest good checkpoint, if it is of this very run."""
  step, train, opt, found = checkpoints.restore(train, opt)
  for what, value in meta.items():
    if found.get(what) != value:
      raise InputError(f'the checkpoint in {checkpoints.folder} was made with another {what} '
                       f'({found.get(what)}, now {value}); use another work directory')
  return step, train, opt, found['seconds']


def _check_trainable(train):
  for name, x in tree.named_arrays(train).items():
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise InputError(f'{name} is {x.dtype} and cannot be trained; attach an adapter (lora) and '
                       "train '.*/kernel/[ab]', or train with fake quantization")


def _check(bad, batches):
  if bad < 0:
    return
  rows = f' (rows {[int(r) for r in batches.rows(bad)]})' if hasattr(batches, 'rows') else ''
  raise NonFiniteError(f'step {bad + 1}: the loss or its gradient is not finite, on batch '
                       f'{bad}{rows}; nothing of it was saved: lower the learning rate, or look '
                       'at that batch')
