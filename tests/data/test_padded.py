import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lean_jax.data.padded import padded


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 9))
def test_every_row_is_in_one_batch_with_its_padding_masked(lengths, batch):
  rows = [(np.full(n, k, np.int32), np.full(n, k % 2, np.int32)) for k, n in enumerate(lengths)]
  seen = []
  for of, b in padded(rows, batch, 40):
    assert b['tokens'].shape[0] <= batch
    for k, tokens, mask, types in zip(of, b['tokens'], b['mask'], b['token_types']):
      assert mask.sum() == lengths[k] and mask[:lengths[k]].all()
      assert (tokens[mask] == k).all() and (types[mask] == k % 2).all()
    assert not b['mask'][len(of):].any()
    seen += of.tolist()
  assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize(('lengths', 'batch', 'shapes'), [
    ([3, 90, 5, 17], 2, [(2, 100), (2, 16)]), ([1, 2, 3], 8, [(4, 16)]), ([], 8, [])])
def test_shapes_are_few(lengths, batch, shapes):
  rows = [(np.zeros(n, np.int32),) * 2 for n in lengths]
  assert [b['tokens'].shape for _, b in padded(rows, batch, 100)] == shapes
