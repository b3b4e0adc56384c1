"""One loop for every method: a method is a loss, a tree, or a pattern of what trains."""
import functools
import inspect
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lean_jax import tree
from lean_jax.errors import InputError, NonFiniteError, Preempted
from lean_jax.training import hosts
from lean_jax.training import mesh as meshes
from lean_jax.training.digest import fingerprint

RECENT, LEAST = 64, 16                 # losses that a spike is measured by: at most, and at least
_CHECKED = 20                          # steps between looks for a loss that is not finite


class Watch(NamedTuple):
  """What becomes of a step whose loss or gradient is not finite, or whose loss is a spike.

  Attributes:
    skip: whether it is left out, its batch named in a warning; else the run stops.
    spike: a loss above so many times the median of the last 64 good ones is one; None is never.
  """
  skip: bool = False
  spike: float | None = None


STOPS = Watch()


def watch(on_nonfinite='stop', spike=None):
  """The Watch of settings.

  Raises:
    InputError: on_nonfinite is neither 'stop' nor 'skip', or spike is not above 1.
  """
  if on_nonfinite not in ('stop', 'skip'):
    raise InputError(f"on_nonfinite {on_nonfinite!r}; expected 'stop' or 'skip'")
  if spike is not None and not spike > 1:
    raise InputError(f'spike {spike}; expected a multiple of the median loss above 1, or None')
  return Watch(on_nonfinite == 'skip', spike)


def fit(loss_fn, params, batches, tx, *, steps, trainable='.*', frozen=None, mesh=None,
        accumulate=1, seed=0, hooks=(), checkpoints=None, settings=None, stop=lambda: False,
        check_every=_CHECKED, watched=STOPS, warn=warnings.warn, rollout=None):
  """Trains the arrays of params whose names match `trainable`; the others stay as they are.

  Batch and key of a step follow from the step alone (and of a `rollout`, from the parameters then),
  so that a run resumed from a checkpoint ends with the very bits of an uninterrupted one.

  Args:
    loss_fn: (params, batch, key, **frozen) -> (scalar, {metric: scalar}), pure; one that has an
      argument `step` is given the steps done before, an int32 scalar.
    params: tree of weights and arrays, the same on every host; the caller's are not donated.
    batches: as `mesh.step_batch` takes them.
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
    stop: asked after each step, on several hosts with the same answer on all; True saves and raises
      Preempted. SIGTERM to one of several hosts stops all of them so, at the same step.
    check_every: steps between looks at what is watched; there is one before each save too.
    watched: a Watch.
    warn: called with a sentence for each step that is skipped, on the first host.
    rollout: None, or (params, batch, key, step) -> batch, pure: what the loss is given in a batch's
      place, of the parameters before the step.

  Returns:
    params, trained, spread over the mesh; and the seconds that it took, those before a resume
    included.

  Raises:
    NonFiniteError: the loss or the gradient is not finite, or a spike, and such steps are not to be
      skipped, or all of the last ones were; nothing of it was saved.
    Preempted: `stop` said so.
    InputError: nothing matches `trainable`, a checkpoint does not fit, the mesh does not, or hosts
      disagree.
  """
  mesh = mesh or meshes.make_mesh()
  meta = dict(seed=seed, data=getattr(batches, 'fingerprint', None), settings=settings)
  hosts.agree('training run', dict(meta, steps=steps, mesh=dict(mesh.shape), trainable=trainable))
  meshes.check(params, mesh)
  put = lambda t: meshes.put(t, meshes.shardings(t, mesh))
  params = put(params)
  frozen = {k: put(t) for k, t in (frozen or {}).items()}
  train, rest = tree.split(params, trainable)
  _check_trainable(train)
  train = jax.tree.map(jnp.copy, train)                # update donates it
  opt = _optimizer_state(tx, train, mesh)
  state = State(train, opt, _recent(watched, mesh))
  first, before, start = 0, 0., time.monotonic()
  seconds = lambda: before + time.monotonic() - start
  if checkpoints is not None:
    meta['frozen'] = fingerprint(rest)
    if checkpoints.latest() is not None:
      first, state, before = _resume(checkpoints, state, meta)
  key = meshes.put(jax.random.key(seed), NamedSharding(mesh, PartitionSpec()))
  update = compiled(loss_fn, tx, accumulate, watched, state)

  unseen = []                                          # (step, loss, whether it is good) to look at
  with meshes.on(mesh):
    for step in range(first, steps):
      batch = meshes.step_batch(batches, step, mesh)
      if rollout is not None:
        batch = rollout(tree.merge(state.train, rest), batch, key, step)
      given = state, rest, frozen, batch, key, np.int32(step)
      if step == first and hosts.several():            # within a step they do not wait for long
        update.lower(*given).compile()
        hosts.barrier('the step is compiled')
      state, metrics, good = update(*given)
      unseen.append((step, metrics['loss'], good))
      done = step + 1
      stopping = stop() or hosts.asked_to_stop()
      saving = checkpoints is not None and (
          stopping or done == steps or done % checkpoints.every == 0)
      if saving or done % check_every == 0 or done == steps:
        _look(unseen, batches, watched, warn)
        unseen = []
      for hook in hooks:
        hook(done, metrics)
      if saving:
        checkpoints.save(done, state.train, state.saved(), dict(meta, seconds=seconds()),
                         force=True)
      if stopping:
        if saving:
          checkpoints.wait()
        raise Preempted(f'asked to stop: stopped after step {done} of {steps}'
                        + ('; saved, the same command goes on from there' if saving else ''))
  jax.block_until_ready(state.train)
  if checkpoints is not None:
    checkpoints.wait()
  return tree.merge(state.train, rest), seconds()


class State(NamedTuple):
  """What a step changes.

  Attributes:
    train: the arrays that train.
    opt: of the optimizer.
    recent: None, or the last good losses, [RECENT] float32, NaN where there are fewer.
  """
  train: object
  opt: object
  recent: object = None

  def saved(self):
    """What a checkpoint has of it besides `train`."""
    return self.opt if self.recent is None else dict(opt=self.opt, recent=self.recent)

  def loaded(self, train, saved):
    """The State of what a checkpoint had."""
    if self.recent is None:
      return State(train, saved)
    return State(train, saved['opt'], saved['recent'])


def compiled(loss_fn, tx, accumulate, watched, like):
  """The compiled step (State, rest, frozen, batch, key, step) -> (State, metrics, good).

  Args:
    loss_fn, tx, accumulate: as of `fit`.
    watched: a Watch.
    like: a State with its shardings, arrays or ShapeDtypeStructs.
  """
  places, shape = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, like))
  return _update(loss_fn, tx, accumulate, watched, shape, tuple(places))


@functools.lru_cache(maxsize=16)
def _update(loss_fn, tx, accumulate, watched, shape, places):
  """The compiled step; the same loss and optimizer are compiled once a process.

  The state leaves it where it entered (`places`): a step that moved it would be compiled again.
  """
  follows = 'step' in inspect.signature(loss_fn).parameters

  @functools.partial(jax.jit, donate_argnums=0,
                     out_shardings=(jax.tree.unflatten(shape, places), None, None))
  def update(state, rest, frozen, batch, key, step):
    train, opt, recent = state

    def loss(train, batch, key):
      given = dict(frozen, step=step) if follows else frozen
      return loss_fn(tree.merge(train, rest), batch, key, **given)
    key = jax.random.fold_in(key, step)
    (value, metrics), grads = _gradient(loss, train, batch, key, accumulate)
    updates, new_opt = tx.update(grads, opt, train)
    norm = optax.global_norm(grads)
    good = jnp.isfinite(value) & jnp.isfinite(norm)
    if watched.spike is not None:
      known = jnp.sum(~jnp.isnan(recent))
      good &= (known < LEAST) | (value <= watched.spike * jnp.nanmedian(recent))
      recent = jnp.where(good, jnp.roll(recent, 1).at[0].set(value.astype(jnp.float32)), recent)
    new = optax.apply_updates(train, updates), new_opt
    if watched.skip:
      new = jax.tree.map(functools.partial(jnp.where, good), new, (train, opt))
      metrics = dict(metrics, skipped=1 - good.astype(jnp.int32))
    return State(*new, recent), dict(metrics, loss=value, grad_norm=norm), good
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


def _recent(watched, mesh):
  """No losses yet; None where nobody asks for spikes."""
  if watched.spike is None:
    return None
  return meshes.put(jnp.full(RECENT, jnp.nan), NamedSharding(mesh, PartitionSpec()))


def _resume(checkpoints, state, meta):
  """The state of the newest good checkpoint, if it is of this very run."""
  step, train, saved, found = checkpoints.restore(state.train, state.saved())
  for what, value in meta.items():
    if found.get(what) != value:
      raise InputError(f'the checkpoint in {checkpoints.folder} was made with another {what} '
                       f'({found.get(what)}, now {value}); use another work directory')
  return step, state.loaded(train, saved), found['seconds']


def _check_trainable(train):
  for name, x in tree.named_arrays(train).items():
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise InputError(f'{name} is {x.dtype} and cannot be trained; attach an adapter (lora) and '
                       "train '.*/kernel/[ab]', or train with fake quantization")


def _look(unseen, batches, watched, warn):
  """Tells of steps that are not good, or raises NonFiniteError."""
  losses, good = jax.device_get(([loss for _, loss, _ in unseen], [g for *_, g in unseen]))
  bad = [(step, loss) for (step, *_), loss, fine in zip(unseen, losses, good) if not fine]
  for step, loss in bad:
    rows = f' (rows {[int(r) for r in batches.rows(step)]})' if hasattr(batches, 'rows') else ''
    which = f'step {step + 1}: ' + (
        'the loss or its gradient is not finite' if watched.spike is None or not np.isfinite(loss)
        else f'a gradient that is not finite, or a loss of {loss:.4g} that is over {watched.spike} '
        'times the median of those before') + f', on batch {step}{rows}'
    if not watched.skip:
      raise NonFiniteError(f'{which}; nothing of it was saved: lower the learning rate, or look '
                           "at that batch, or skip such steps by on_nonfinite='skip'")
    if hosts.first():
      warn(f'{which}; skipped')
  if len(bad) == len(unseen) >= _CHECKED:
    raise NonFiniteError(f'steps {bad[0][0] + 1} to {bad[-1][0] + 1} were all skipped; go back to '
                         'an earlier checkpoint, and lower the learning rate')
