"""Batches of rows of about one length: each row once an epoch, in few different shapes."""
import numpy as np
import pytest

from lean_jax.data.rows import RUN, RowBatches

COUNT, BATCH = 1003, 4


def batches(seed=0, lengths=None):
  return RowBatches(COUNT, BATCH, seed, lambda which: which, 'rows', lengths)


@pytest.fixture(scope='module')
def lengths():
  return np.random.default_rng(1).integers(1, 100, COUNT)


def test_each_row_comes_once_an_epoch_and_another_is_left_out_of_each(lengths):
  given, each = batches(lengths=lengths), COUNT // BATCH
  epochs = [np.concatenate([given[step] for step in range(e * each, (e + 1) * each)])
            for e in range(2)]
  for rows in epochs:
    assert len(rows) == len(set(rows.tolist())) == each * BATCH
  left = [set(range(COUNT)) - set(rows.tolist()) for rows in epochs]
  assert left[0] != left[1] and (epochs[0] != epochs[1]).any()


def test_a_batch_is_of_about_one_length_and_batches_are_in_no_order(lengths):
  first = [lengths[batches(lengths=lengths)[step]] for step in range(RUN)]
  assert max(np.ptp(of) for of in first) < 20 < np.mean([np.ptp(lengths[batches()[step]])
                                                         for step in range(RUN)])
  steps = np.diff([of.mean() for of in first])
  assert (steps < 0).any() and (steps > 0).any()


def test_the_order_is_of_a_seed_alone_and_another_run_is_told_apart(lengths):
  one, same, other = (batches(seed, lengths) for seed in (0, 0, 1))
  np.testing.assert_array_equal(one[700], same[700])
  assert (one[700] != other[700]).any()
  assert one.fingerprint == same.fingerprint != other.fingerprint
  assert one.fingerprint != batches().fingerprint
