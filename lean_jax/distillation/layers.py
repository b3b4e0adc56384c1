"""Which layer of a student learns from which of its teacher."""
import re

from lean_jax.errors import InputError


def layer_map(given, student, teacher):
  """The pairs (student's layer, teacher's layer), numbered from 0.

  Args:
    given: 'uniform', all of the student's, the last of each even part of the teacher's: g(m) = m
      N / M of TinyBERT (arXiv:1909.10351, section 3.1), which numbers from 1; 'last', the student's
      with as many last ones; 'last-3', three last ones with three last ones; or a list of pairs.
    student, teacher: how many layers each has.

  Raises:
    InputError: no such map, or a layer out of range.
  """
  if given == 'uniform' and student <= teacher:
    return tuple((m, (m + 1) * teacher // student - 1) for m in range(student))
  if isinstance(given, str) and (last := re.fullmatch(r'last(-\d+)?', given)):
    count = int(last[1][1:]) if last[1] else student
    if 1 <= count <= min(student, teacher):
      return tuple((student - k, teacher - k) for k in range(count, 0, -1))
  elif not isinstance(given, str):
    pairs = tuple(tuple(pair) for pair in given) if _listed(given) else ()
    if pairs and all(0 <= s < student and 0 <= t < teacher for s, t in pairs):
      return pairs
  raise InputError(f'layers {given!r} of a student of {student} and a teacher of {teacher}; '
                   "expected 'uniform', 'last' or 'last-3' where the teacher has as many, or pairs "
                   f'[student, teacher] of 0 to {student - 1} and 0 to {teacher - 1}')


def _listed(given):
  return isinstance(given, (list, tuple)) and all(
      isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(k) is int for k in pair)
      for pair in given)
