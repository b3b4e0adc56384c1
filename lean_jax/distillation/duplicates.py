"""Texts that say again what one before said, found without comparing all with all.

Texts are sets of `WORDS` neighbouring words (shingles). Two are near duplicates where the Jaccard
similarity of the sets is `ALIKE` or more, as Lee et al. 2021 (arXiv:2107.06499, section 4.2 and
appendix A) have it; theirs are five tokens, and 0.8. MinHash (Broder 1997, 'On the resemblance and
containment of documents') finds candidates: of BANDS x ROWS hash functions, the least values of two
sets agree in a band of ROWS with probability J**ROWS, so that a pair at 0.8 is missed with
(1 - 0.8**4)**32 = 5e-8. A candidate's similarity is then computed.
"""
import hashlib
import re

import numpy as np

WORDS, ALIKE = 5, .8
BANDS, ROWS = 32, 4


def normalised(text):
  """The words of a text, in lower case, without punctuation around them."""
  return re.findall(r"\w+(?:[.,']\w+)*|[^\w\s]{2,}", text.lower())


class Seen:
  """Texts so far; those of one group are compared with each other."""

  def __init__(self):
    draw = np.random.default_rng(0)
    self._factors = draw.integers(1 << 63, 1 << 64, BANDS * ROWS, np.uint64) | np.uint64(1)
    self._exact, self._bands, self._sets = set(), {}, []

  def add(self, group, text):
    """None of a text that is new, which is then among those seen; else 'same' or 'alike'."""
    words = normalised(text)
    exact = _digest(repr((group, words or text)))
    if exact in self._exact:
      return 'same'
    shingles = {_digest(' '.join(words[k:k + WORDS]))
                for k in range(max(1, len(words) - WORDS + 1))}
    keys = [(group, *band) for band in self._signature(shingles)]
    near = {n for key in keys for n in self._bands.get(key, ())}
    if any(len(shingles & self._sets[n]) >= ALIKE * len(shingles | self._sets[n]) for n in near):
      return 'alike'
    self._exact.add(exact)
    for key in keys:
      self._bands.setdefault(key, []).append(len(self._sets))
    self._sets.append(shingles)
    return None

  def _signature(self, shingles):
    """The bands of the least hashes: [(number of the band, their bytes)].

    A hash is multiplied by an odd number, modulo 2**64 (Dietzfelbinger et al. 1997).
    """
    least = (np.fromiter(shingles, np.uint64)[:, None] * self._factors[None]).min(0)
    return [(n, band.tobytes()) for n, band in enumerate(least.reshape(BANDS, ROWS))]


def _digest(text):
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')
