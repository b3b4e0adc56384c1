"""Rows of ids of different lengths, in padded batches of few different shapes."""
import numpy as np

LEAST = 16                    # tokens of the shortest batch


def padded(rows, batch, context):
  """Batches of rows of about one length each, so that little is padding.

  Args:
    rows: [(ids [T], types [T])].
    batch: rows of a batch, or the next power of two if all are fewer; the last one is filled up
      with rows of no token.
    context: the longest row there may be.

  Yields:
    (where in `rows` its first rows are from, dict as `stacked` gives it).
  """
  lengths = np.array([len(ids) for ids, _ in rows], np.int64)
  order = np.argsort(-lengths, kind='stable')
  B = min(batch, power(len(rows)))
  for start in range(0, len(order), batch):
    of = order[start:start + batch]
    yield of, stacked([rows[k] for k in of], B, context)


def stacked(rows, batch, context):
  """Some rows as one batch: dict of tokens, mask and token_types, each [batch T].

  T is a power of two from `LEAST` up, or the context. Rows that are lacking have no token.
  """
  T = min(context, max(LEAST, power(max(len(ids) for ids, _ in rows))))
  out = dict(tokens=np.zeros((batch, T), np.int32), mask=np.zeros((batch, T), bool),
             token_types=np.zeros((batch, T), np.int32))
  for row, (ids, types) in enumerate(rows):
    n = len(ids)
    out['tokens'][row, :n], out['token_types'][row, :n] = ids, types
    out['mask'][row, :n] = True
  return out


def power(n):
  """The power of two from n up."""
  return 1 << (int(n) - 1).bit_length() if n > 1 else 1
