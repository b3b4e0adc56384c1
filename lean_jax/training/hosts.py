"""Several processes, each with devices of its own, as one machine: started, agreed, ended together.

Every host runs the same program on the same settings; what it prints and writes beside checkpoints
is the first one's. A host that dies ends the others within `heartbeat` seconds and a few more.
"""
import hashlib
import itertools
import json

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from lean_jax.errors import InputError

HEARTBEAT = 60                         # seconds
_asked = itertools.count(1)            # preemption is agreed on by numbers that only grow


def start(hosts='auto', *, coordinator=None, host=None, heartbeat=HEARTBEAT):
  """Joins the other processes; to be called before anything asks for devices.

  Args:
    hosts: 'auto' where `jax.distributed` finds its peers by itself (TPU VMs, SLURM, Open MPI), or
      how many processes there are.
    coordinator: 'ADDRESS:PORT' of the first process, any free port of it; with a number of hosts.
    host: the number of this process, from 0; with a number of hosts.
    heartbeat: seconds without a sign of life after which a host is given up, and all end.

  Raises:
    InputError: settings that miss each other, no peers to find, or they do not come.
  """
  given = [coordinator is not None, host is not None]
  if hosts == 'auto' and any(given):
    raise InputError('hosts auto finds the coordinator and the number of this host by itself; '
                     'leave them out, or say how many hosts')
  if hosts != 'auto' and not all(given):
    raise InputError(f'{hosts} hosts without coordinator or host; give ADDRESS:PORT of the first '
                     'and the number of this one, or hosts auto')
  if hosts != 'auto' and not 0 <= host < hosts:
    raise InputError(f'host {host} of {hosts}; expected 0 to {hosts - 1}')
  if heartbeat < 1:
    raise InputError(f'a heartbeat of {heartbeat} seconds; expected 1 or more')
  peers = {} if hosts == 'auto' else dict(
      coordinator_address=coordinator, num_processes=hosts, process_id=host)
  try:
    jax.distributed.initialize(**peers, heartbeat_timeout_seconds=heartbeat,
                               shutdown_timeout_seconds=heartbeat)
  except (ValueError, RuntimeError) as error:
    said = ' '.join(str(error).split())[:200]
    raise InputError(f'the hosts do not find each other: {said}; start all at about the same time, '
                     'or give hosts, coordinator and host') from error


def several():
  """Whether there is more than one process."""
  return jax.process_count() > 1


def first():
  """Whether this process is the one that prints and writes what is not spread over all."""
  return jax.process_index() == 0


def barrier(name):
  """Returns once every host is here, however long that takes; a dead one ends the wait.

  Devices take no part: on a CPU they would not wait for more than half a minute.
  """
  if several():
    multihost.get_barrier_sync_fn()(key=name.replace(' ', '_'), timeout_ms=7 * 86_400_000)


def of_first(value):
  """The first host's value, on all: anything that JSON holds."""
  return json.loads(_texts(json.dumps(value))[0]) if several() else value


def of_all(value):
  """Every host's value, in their order: anything that JSON holds."""
  return [json.loads(t) for t in _texts(json.dumps(value))] if several() else [value]


def of_any(text):
  """The first text that is not None among those of all hosts; None if all are."""
  return next((t for t in of_all(text) if t is not None), None)


def part():
  """Leaves the other hosts, as all do at this moment; threads that wait for one wait no more."""
  jax.distributed.shutdown()


def agree(what, document):
  """Returns if all hosts have the same document, by its hash.

  Args:
    what: it is, for the error.
    document: anything that JSON holds.

  Raises:
    InputError: on all hosts, with what differs.
  """
  if not several():
    return
  text = json.dumps(document, sort_keys=True)
  own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
  hashes = _gathered(own)
  if (hashes == hashes[:1]).all():
    return
  flat = [dict(_leaves(json.loads(t))) for t in _texts(text)]
  absent = object()
  said = []
  for key in sorted(set().union(*flat)):
    values = [f.get(key, absent) for f in flat]
    if any(v != values[0] for v in values):
      told = ('absent' if v is absent else repr(v) for v in values)
      said.append(f'{key} is ' + ', '.join(f'{v} on host {k}' for k, v in enumerate(told)))
  more = f'; and {len(said) - 5} others' if said[5:] else ''
  raise InputError(f'the hosts disagree on the {what}: {"; ".join(said[:5])}{more}; start all with '
                   'the same command and files')


def asked_to_stop():
  """Whether a host was sent SIGTERM; the answer of all hosts is the same, at the same question."""
  return several() and multihost_utils.reached_preemption_sync_point(next(_asked))


def local(tree):
  """Arrays that are spread over hosts as whole ones on a device of this host; one at a time."""
  def one(x):
    if getattr(x, 'is_fully_addressable', True):
      return x
    if not x.is_fully_replicated:
      mesh = x.sharding.mesh
      whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
      x = jax.jit(lambda x: x, out_shardings=whole)(x)
    return jax.device_put(x.addressable_data(0), jax.local_devices()[0])
  return jax.tree.map(one, tree)


def _texts(text):
  """The texts of all hosts, in their order."""
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = _gathered(np.array([len(data)], np.int32))[:, 0]
  room = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)   # few shapes, few compilations
  room[:len(data)] = data
  rows = _gathered(room)
  return [row[:n].tobytes().decode() for row, n in zip(rows, sizes)]


def _gathered(x):
  """[hosts ...] of every host's array."""
  barrier('gather')
  return multihost_utils.process_allgather(x)


def _leaves(tree, path=''):
  """(path, value) of what is no dictionary and no list."""
  if isinstance(tree, dict | list) and tree:
    for key, x in tree.items() if isinstance(tree, dict) else enumerate(tree):
      yield from _leaves(x, f'{path}.{key}' if path else str(key))
  else:
    yield path or 'it', tree
