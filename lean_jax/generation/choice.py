"""One of several texts: by what most of them answer, or by a score."""
import collections
import math

from lean_jax.errors import InputError


def majority(answers):
  """The index of the first answer that is among the most frequent ones.

  Self-consistency (Wang et al. 2022, arXiv:2203.11171, section 2) without weights.

  Args:
    answers: one of each text, hashable; None where a text has none, which does not count unless
      no text has one.
  """
  counts = collections.Counter(a for a in answers if a is not None)
  return answers.index(counts.most_common(1)[0][0]) if counts else 0


def best(scores):
  """The index of the first of the largest scores (Cobbe et al. 2021, arXiv:2110.14168, section 4).

  Raises:
    InputError: a score that is no number.
  """
  odd = [s for s in scores if not isinstance(s, int | float) and not hasattr(s, '__float__')]
  if odd or any(math.isnan(float(s)) for s in scores):
    raise InputError(f'scores {scores}; a scorer gives a number of each text')
  return max(range(len(scores)), key=lambda k: float(scores[k]))
