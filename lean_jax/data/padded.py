"""Rows of ids of different lengths, in padded batches of few different shapes."""
import numpy as np

LEAST = 16                    # tokens of the shortest batch


def padded(rows, batch, context):
  """Batches of rows of about one length each, so that little is padding.

  Args:
    rows: [(ids [T], types [T])].
    batch: rows of a batch; a last one that is smaller is filled up with rows of no token, to a
      power of two.
    context: the longest row there may be.

  Yields:
    (where in `rows` its first rows are from, dict: tokens, mask, token_types, each [B T]). T is a
    power of two, or the context.
  """
  lengths = np.array([len(ids) for ids, _ in rows], np.int64)
  order = np.argsort(-lengths, kind='stable')
  for start in range(0, len(order), batch):
    of = order[start:start + batch]
    B = min(batch, 1 << (len(of) - 1).bit_length())
    T = min(context, max(LEAST, 1 << (int(lengths[of].max(initial=1)) - 1).bit_length()))
    out = dict(tokens=np.zeros((B, T), np.int32), mask=np.zeros((B, T), bool),
               token_types=np.zeros((B, T), np.int32))
    for row, k in enumerate(of):
      n = lengths[k]
      out['tokens'][row, :n], out['token_types'][row, :n] = rows[k]
      out['mask'][row, :n] = True
    yield of, out
