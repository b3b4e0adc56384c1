import numpy as np
import pytest

from lean_jax.data.batches import Batches, sequential
from lean_jax.data.windows import Windows
from lean_jax.errors import InputError


def windows(n=10, length=4):
  array = np.arange(n * length, dtype=np.uint16).reshape(n, length)
  return Windows(array, stream_tokens=n * length + 1, bytes=99, documents=3, fingerprint='x')


def test_a_batch_depends_on_seed_and_step_alone():
  forward, backward = Batches(windows(), 4, seed=3), Batches(windows(), 4, seed=3)
  late = [backward[step]['tokens'] for step in reversed(range(12))]
  for step in range(12):
    np.testing.assert_array_equal(forward[step]['tokens'], late[11 - step])
  assert any((Batches(windows(), 4, seed=4).rows(i) != forward.rows(i)).any() for i in range(3))


def test_rows_name_the_windows_of_a_batch():
  batches = Batches(windows(), 4, seed=0)
  batch = batches[5]
  assert list(batch) == ['tokens']
  assert batch['tokens'].dtype == np.int32
  np.testing.assert_array_equal(batch['tokens'], windows().array[batches.rows(5)])


@pytest.mark.parametrize('batch', [1, 3, 4, 10])
def test_every_window_comes_once_an_epoch_in_a_new_order(batch):
  batches = Batches(windows(), batch, seed=1)
  rows = np.concatenate([batches.rows(step) for step in range(30 // batch)])[:30 // 10 * 10]
  epochs = [rows[i:i + 10] for i in range(0, len(rows) - 9, 10)]
  assert len(epochs) >= 2
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert any((epoch != epochs[0]).any() for epoch in epochs)


def test_without_shuffling_windows_come_in_order():
  batches = Batches(windows(), 4, seed=1, shuffle=False)
  rows = np.concatenate([batches.rows(step) for step in range(5)])
  np.testing.assert_array_equal(rows, [*range(10), *range(10)])


def test_a_host_reads_its_rows_of_the_same_batch():
  batches = Batches(windows(), 4, seed=2)
  for step in (0, 7):
    part = batches.part(step, np.array([1, 3]))['tokens']
    np.testing.assert_array_equal(part, batches[step]['tokens'][[1, 3]])


@pytest.mark.parametrize('batch', [1, 4, 5, 16])
def test_evaluation_sees_every_window_once_and_masks_the_rest(batch):
  found = list(sequential(windows(), batch))
  assert all(part['tokens'].shape == part['mask'].shape == (batch, 4) for part in found)
  assert (found[0]['tokens'].dtype, found[0]['mask'].dtype) == (np.int32, np.float32)
  tokens = np.concatenate([part['tokens'] for part in found])
  mask = np.concatenate([part['mask'] for part in found])
  np.testing.assert_array_equal(tokens[mask[:, 0] == 1], windows().array)
  assert mask.sum() == windows().tokens


@pytest.mark.parametrize(('fields', 'match'), [
    (dict(batch=11), '44 tokens, the corpus has 40'), (dict(batch=0), 'from 1 to 10'),
    (dict(seed=-1), 'seed -1'),
    (dict(seed=1 << 32), 'seed')])
def test_bad_fields_are_one_line(fields, match):
  with pytest.raises(InputError, match=match) as caught:
    Batches(windows(), **dict(dict(batch=4, seed=0), **fields))
  assert '\n' not in str(caught.value)


def test_steps_begin_at_zero():
  with pytest.raises(InputError, match='step -1'):
    Batches(windows(), 4, seed=0)[-1]
  with pytest.raises(InputError, match='1 or more'):
    next(sequential(windows(), 0))
