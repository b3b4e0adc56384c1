"""A teacher on devices of its own: its labels of the next batch are made while the student learns.

Teacher and student are then two programs, each on its own mesh, and what goes between them is the k
most probable tokens after each and the probability of all others: what `cache` has on disk, without
its rounding.
"""
import collections
import dataclasses
from typing import Any

import jax

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
      InputError: several hosts, another vocabulary, k out of range, or a weight that the mesh does
        not divide.
    """
    mine, theirs = self.teacher.config.vocabulary, student.config.vocabulary
    if jax.process_count() > 1:
      raise InputError(f'teacher_mesh on {jax.process_count()} hosts; it is for devices of one: '
                       'make a cache of its labels, or share one mesh')
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
    self._module, self._of = of.teacher.module, fingerprint(of.teacher.params)
    self._params = meshes.put(of.teacher.params, meshes.shardings(of.teacher.params, of.mesh))
    self._begun = collections.OrderedDict()

  @property
  def fingerprint(self) -> str:
    """What the batches are a function of."""
    return f'{self.batches.fingerprint} {self._of} {self.k}'

  def __getitem__(self, step):
    """tokens [B T]; label_ids [B T k], int32, and label_log_probs [B T k+1], float32."""
    given, labels = self._begin(step)
    self._begin(step + 1)                              # computed while the student learns from this
    return given | of_batch(*jax.device_get(labels))

  def _begin(self, step):
    """A step's batch, and its labels, which may still be being computed."""
    if step not in self._begun:
      given = dict(self.batches[step])
      with meshes.on(self.mesh):
        tokens = meshes.put_batch(dict(tokens=given['tokens']), self.mesh)['tokens']
        self._begun[step] = given, top_labels(self._module, self._params, tokens, self.k)
      while len(self._begun) > AHEAD:
        self._begun.popitem(last=False)
    return self._begun[step]
