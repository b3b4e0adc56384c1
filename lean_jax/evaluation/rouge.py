"""ROUGE-L (Lin 2004, section 3): how much of a text stands in another in the same order."""


def rouge_l(written, references):
  """F1 of the longest common subsequence, with the reference that it is best with; 0 to 1.

  Args:
    written: words, or ids.
    references: one or more such.
  """
  def f1(reference):
    return 2 * common(written, reference) / max(len(written) + len(reference), 1)
  return max(map(f1, references))


def common(a, b):
  """The length of the longest common subsequence of two sequences."""
  longest = [0] * (len(b) + 1)                             # of what was read of a, with b[:j]
  for x in a:
    before = 0
    for j, y in enumerate(b):
      before, longest[j + 1] = longest[j + 1], (
          before + 1 if x == y else max(longest[j + 1], longest[j]))
  return longest[-1]
