"""A teacher on devices of its own: its labels of the next batch are made while the student learns.

Teacher and student are then two programs, each on its own mesh, and what goes between them is the k
most probable tokens after each and the probability of all others: what `cache` has on disk, without
its rounding.

On several hosts each has devices of both meshes, and takes the labels of the rows that its own part
of the student learns from off its own part of the teacher: they never go from host to host.
"""
import collections
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from lean_jax.distillation.cache import Labelled, of_batch, top_labels
from lean_jax.errors import InputError
from lean_jax.training import mesh as meshes
from lean_jax.training.digest import fingerprint

AHEAD = 2                     # batches whose labels are kept: a step's and the next one's


@dataclasses.dataclass(frozen=True, eq=False)
class Elsewhere:
  """A teacher and the devices that it works on, in the place of a `cache.Cache`.

  Attributes:
    teacher: a `lean_jax.Model`, a decoder, of the student's tokenizer.
    mesh: of `training.mesh.make_mesh`.
    k: tokens of a position.
  """
  teacher: Any
  mesh: jax.sharding.Mesh
  k: int

  def labelled(self, batches, student):
    """The batches with the teacher's labels, for a student.

    Raises:
      InputError: another vocabulary, k out of range, a host without devices of the mesh, or a
        weight that the mesh does not divide.
    """
    mine, theirs = self.teacher.config.vocabulary, student.config.vocabulary
    without = set(range(jax.process_count())) - {d.process_index for d in self.mesh.devices.flat}
    if without:
      raise InputError(f'teacher_mesh has no device of host {min(without)}; give it some of each '
                       "host's, or make a cache of the teacher's labels")
    if mine != theirs:
      raise InputError(f'the teacher has a vocabulary of {mine} and the student of {theirs}; soft '
                       'labels need the same')
    if not 1 <= self.k <= mine:
      raise InputError(f'top_k {self.k}; give 1 to {mine}, the vocabulary')
    meshes.check(self.teacher.params, self.mesh)
    return TaughtBatches(batches, self)


class TaughtBatches(Labelled):
  """Batches of text with a teacher's labels, computed on its devices, a batch ahead."""

  def __init__(self, batches, of):
    """Puts the teacher of an Elsewhere where it works."""
    self.batches, self.mesh, self.k = batches, of.mesh, of.k
    self._of, params = fingerprint(of.teacher.params), of.teacher.params
    self._params = meshes.put(params, meshes.shardings(params, of.mesh))
    self._labels = jax.jit(functools.partial(top_labels, of.teacher.module, k=of.k),
                           out_shardings=meshes.batch_sharding(of.mesh))
    self._begun = collections.OrderedDict()

  @property
  def fingerprint(self) -> str:
    """What the batches are a function of."""
    return f'{self.batches.fingerprint} {self._of} {self.k}'

  def __getitem__(self, step):
    """tokens [B T]; label_ids [B T k], int32, and label_log_probs [B T k+1], float32."""
    return self.part(step, slice(None))

  def part(self, step, rows):
    """Some rows of a step's batch: what a host reads of it.

    Raises:
      InputError: no device of the teacher on this host has the labels of one of them.
    """
    labels = self._begin(step)
    self._begin(step + 1)                              # computed while the student learns from this
    numbers = np.arange(self.batch)[rows]
    return dict(self.batches.part(step, rows)) | of_batch(*(_rows(x, numbers) for x in labels))

  def _begin(self, step):
    """A step's labels, which may still be being computed."""
    if step not in self._begun:
      with meshes.on(self.mesh):
        tokens = meshes.step_batch(self.batches, step, self.mesh)['tokens']
        self._begun[step] = self._labels(self._params, tokens)
      while len(self._begun) > AHEAD:
        self._begun.popitem(last=False)
    return self._begun[step]


def _rows(x, numbers):
  """Rows of an array of which this host's devices have them."""
  have = {}
  for shard in x.addressable_shards:
    own = range(*shard.index[0].indices(len(x)))
    if own.start not in have:                          # or another device has the same rows
      have |= zip(own, np.asarray(shard.data))
  missing = [k for k in numbers.tolist() if k not in have]
  if missing:
    raise InputError(f"host {jax.process_index()} learns from row {missing[0]} of a batch, which "
                     "the teacher's devices of another host have read; list the devices of both "
                     'meshes host by host, as many rows on each')
  return np.stack([have[k] for k in numbers.tolist()])
