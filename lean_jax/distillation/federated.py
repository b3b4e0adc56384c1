"""Federated distillation: clients teach each other by what they predict on text that all have.

Li & Wang 2019 (FedMD, arXiv:1910.03581), algorithm 1; Jeong et al. 2018 (arXiv:1811.11479). Each
client is a process with text of its own and a model of its own, of any architecture, over one
tokenizer. In each round it trains on its own text (revisit), says what it predicts on some public
windows (communicate), and learns the average of what all said (digest). What is shared are files
in a folder, each written beside and then renamed:

  agreed.json            what all agreed on, by the server
  round-0/NAME.npz       of a client: probabilities of the likeliest tokens
  round-0/average.npz    their average, by the server

No weights and no text are in them: `FIELDS` are all the arrays that there may be.
"""
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax import files
from lean_jax.errors import InputError
from lean_jax.kernels.distill_loss.kinds import buckets, forward_kl
from lean_jax.objectives.forward import forward, masked_mean

# ids [rows T-1 k] integer, log_p [rows T-1 k] float16, of the k likeliest next tokens; rest
# [rows T-1] float16, log of the probability of all others.
FIELDS = ('ids', 'log_p', 'rest')
LEAST = -25.                  # log of the least rest, so that float16 and gradients stay finite
AVERAGE, AGREED = 'average', 'agreed.json'


def server(folder, clients, *, public, vocabulary, rounds, windows, top=None, weights=None, seed=0,
           timeout=3600.):
  """Averages what clients say, a round after the other; a restart goes on from the files.

  Args:
    folder: that all can write to.
    clients: their names.
    public: fingerprint of the public windows, their number and length: (str, int, int).
    vocabulary: tokens of the models.
    rounds: how many.
    windows: public windows of a round.
    top: likeliest tokens that are shared; None is all of them.
    weights: of the clients in the average; None is alike.
    seed: of which windows.
    timeout: seconds to wait for a client.

  Raises:
    InputError: names or numbers that cannot be, a folder of another run, a file that is not as was
      agreed, or a client that does not answer in time.
  """
  folder, clients = pathlib.Path(folder), tuple(clients)
  weights = tuple(weights or (1.,) * len(clients))
  fingerprint, count, length = public
  top = vocabulary if top is None else top
  if not clients or len(set(clients)) < len(clients) or AVERAGE in clients or any(
      not name.isidentifier() for name in clients):
    raise InputError(f'clients {clients!r}; expected names of letters and digits, each once')
  if len(weights) != len(clients) or not min(weights) > 0:
    raise InputError(f'weights {weights!r} of {len(clients)} clients; expected one above 0 each')
  if not 1 <= windows <= count or not 1 <= top <= vocabulary or rounds < 1:
    raise InputError(f'{windows} of {count} public windows, top {top} of {vocabulary}, {rounds} '
                     'rounds; expected 1 or more, and no more than there are')
  agreed = dict(clients=clients, public=fingerprint, count=count, length=length, windows=windows,
                vocabulary=vocabulary, top=top, rounds=rounds, seed=seed, weights=weights)
  path = folder / AGREED
  if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(agreed)):
    raise InputError(f'{str(folder)!r} is of another run; name another folder')
  files.write_text(path, json.dumps(agreed))
  for k in range(rounds):
    at = folder / f'round-{k}'
    if not (at / f'{AVERAGE}.npz').exists():
      given = [_awaited(at / f'{name}.npz', agreed, timeout) for name in clients]
      _write(at / f'{AVERAGE}.npz', average(given, weights, vocabulary, top))


def average(given, weights, vocabulary, top):
  """The weighted average of several `FIELDS`, of the `top` likeliest tokens by it.

  What a client left to the rest counts as spread evenly over the tokens that it does not name.
  """
  out = []
  for k in range(len(given[0]['rest'])):                # a window at a time: all are [rows T-1 V]
    total = 0.
    for shared, weight in zip(given, weights):
      ids, log_p, rest = (shared[name][k] for name in FIELDS)
      others = max(vocabulary - ids.shape[-1], 1)
      p = np.repeat(np.exp(rest.astype(np.float32))[:, None] / others, vocabulary, axis=1)
      np.put_along_axis(p, ids.astype(np.int64), np.exp(log_p.astype(np.float32)), axis=1)
      total = total + weight / sum(weights) * p / p.sum(axis=1, keepdims=True)
    out.append(_likeliest(np.log(np.maximum(total, np.finfo(np.float32).tiny)), top))
  return {name: np.stack([part[name] for part in out]) for name in FIELDS}


def client(model, folder, name, *, train, save, load, public, workdir, revisit, digest,
           timeout=3600.):
  """One client's life: returns its model after all rounds.

  Args:
    model: a `lean_jax.Model` at the start of it.
    folder: the shared one.
    name: of this client.
    train: (model, batches or None, objective or None, steps, round, phase folder) -> model: trains
      on the client's own text, or where batches are given on them, by the objective.
    save, load: (model, folder) and folder -> model.
    public: Windows that all have.
    workdir: this client's own folder, where its models are kept; the same call goes on with it.
    revisit, digest: steps of a round on its own text and on the average.
    timeout: seconds to wait for the server.

  Raises:
    InputError: not a client of this run, other public windows or another vocabulary, or a server
      that does not answer in time.
  """
  folder, workdir = pathlib.Path(folder), pathlib.Path(workdir)
  agreed = _agreed(folder, model, name, public, timeout)
  for k in range(agreed['rounds']):
    done, at = workdir / f'round-{k}' / 'model', folder / f'round-{k}'
    if done.exists():
      model = load(done)
      continue
    model = train(model, None, None, revisit, k, workdir / f'round-{k}' / 'revisit')
    rows = chosen(agreed, k)
    if not (at / f'{name}.npz').exists():
      _write(at / f'{name}.npz', shown(model, public, rows, agreed['top']))
    target = _awaited(at / f'{AVERAGE}.npz', agreed, timeout)
    batches = _Digest(public, rows, target, agreed)
    model = train(model, batches, (like_average(model.module), dict(kind='federated', round=k)),
                  digest, k, workdir / f'round-{k}' / 'digest')
    save(model, done)
  return model


def chosen(agreed, k):
  """The numbers of the public windows of round k."""
  return np.sort(np.random.default_rng((agreed['seed'], k)).choice(
      agreed['count'], agreed['windows'], replace=False))


def shown(model, public, rows, top, batch=16):
  """The `FIELDS` that a model says of public windows."""
  out = []
  for start in range(0, len(rows), batch):
    tokens = np.asarray(public.array[rows[start:start + batch]], np.int32)
    logits = np.asarray(model.logits(tokens))[:, :-1].astype(np.float32)
    out.append(_likeliest(np.asarray(jax.nn.log_softmax(logits)), top))
  return {name: np.concatenate([part[name] for part in out]) for name in FIELDS}


@functools.lru_cache             # the same object for the same module: its step is compiled once
def like_average(module):
  """The loss (params, batch, key): KL(average || student), in nats a token.

  Of the likeliest tokens one by one, and of all others as one: what is shared says no more.
  """
  def loss(params, batch, key):
    del key
    logits, auxiliary = forward(module, params, dict(tokens=batch['tokens']))
    log_q = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))             # [B T-1 V]
    value = top_kl(log_q, batch['ids'], batch['log_p'], batch['rest'])
    mean = masked_mean(value, jnp.ones_like(value))
    return mean + auxiliary, dict(federated=jax.lax.stop_gradient(mean))
  return loss


def top_kl(log_q, ids, log_p, rest):
  """KL of named tokens and of all others together, [B T].

  Args:
    log_q: [B T V], the student's.
    ids, log_p: [B T k], named tokens and the target's logs of them.
    rest: [B T], log of the target's probability of all others.
  """
  V, k = log_q.shape[-1], ids.shape[-1]
  if k < V:
    log_p = jnp.concatenate([log_p, rest[..., None]], axis=-1)
  q = buckets(log_q.reshape(-1, V), ids.reshape(-1, k))
  return forward_kl(q, log_p.reshape(q.shape).astype(jnp.float32)).reshape(rest.shape)


class _Digest:
  """Batches of public windows and of the average on them, a function of the step."""

  def __init__(self, public, rows, target, agreed):
    self._public, self._rows, self._target = public, rows, target
    self._batch = min(16, len(rows))
    self.fingerprint = f'{agreed["public"]} {agreed["seed"]} {agreed["windows"]} {self._batch}'

  def __getitem__(self, step):
    which = np.random.default_rng(step).choice(len(self._rows), self._batch, replace=False)
    ids, log_p, rest = (self._target[name][which] for name in FIELDS)
    return dict(tokens=np.asarray(self._public.array[self._rows[which]], np.int32),
                ids=ids.astype(np.int32), log_p=log_p, rest=rest)


def _likeliest(log_p, top):
  """`FIELDS` of log-probabilities [rows T V]."""
  V = log_p.shape[-1]
  ids = (np.argpartition(-log_p, top, axis=-1)[..., :top] if top < V else
         np.broadcast_to(np.arange(V), log_p.shape))
  named = np.maximum(np.take_along_axis(log_p, ids, axis=-1), LEAST)
  left = 1 - np.exp(named).sum(axis=-1) if top < V else np.zeros(log_p.shape[:-1])
  return dict(ids=ids.astype(np.uint16 if V <= 1 << 16 else np.uint32),
              log_p=named.astype(np.float16),
              rest=np.log(np.maximum(left, np.exp(LEAST))).astype(np.float16))


def _write(path, arrays):
  with files.replacing(path) as file:
    np.savez(file, **arrays)


def _awaited(path, agreed, timeout):
  """The arrays of a file that another process writes, checked against what was agreed."""
  _wait(path, timeout)
  shape = (agreed['windows'], agreed['length'] - 1)
  try:
    with np.load(path, allow_pickle=False) as found:
      arrays = {name: found[name] for name in found.files}
    good = set(arrays) == set(FIELDS) and arrays['rest'].shape == shape and all(
        arrays[name].shape == (*shape, agreed['top']) for name in ('ids', 'log_p')) and all(
        np.isfinite(arrays[name]).all() for name in ('log_p', 'rest')) and (
        arrays['ids'].max() < agreed['vocabulary'])
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise InputError(f'{str(path)!r} cannot be read ({error}); remove it, and start whoever wrote '
                     'it again') from error
  if not good:
    raise InputError(f'{str(path)!r} is not what was agreed on: {", ".join(FIELDS)} of '
                     f'{agreed["top"]} tokens at {shape} places; remove it, and start whoever '
                     'wrote it again')
  return arrays


def _agreed(folder, model, name, public, timeout):
  _wait(folder / AGREED, timeout)
  agreed = json.loads((folder / AGREED).read_text())
  if name not in agreed['clients']:
    raise InputError(f'no client {name!r} in {str(folder)!r}; there are: '
                     f'{", ".join(agreed["clients"])}')
  ours = dict(public=public.fingerprint, count=len(public), length=public.length,
              vocabulary=model.config.vocabulary)
  odd = [k for k, value in ours.items() if agreed[k] != value]
  if odd:
    raise InputError(f'{name} has {odd[0]} {ours[odd[0]]!r}, and {agreed[odd[0]]!r} was agreed on; '
                     'give all clients the same public text and tokenizer')
  return agreed


def _wait(path, timeout):
  end = time.monotonic() + timeout
  while not path.exists():
    if time.monotonic() > end:
      raise InputError(f'{str(path)!r} did not come in {timeout:g} seconds; start whoever '
                       'writes it')
    time.sleep(.05)
