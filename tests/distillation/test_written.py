"""What a model writes by itself, to train another on."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.distillation.written import SURE, written
from lean_jax.errors import InputError


@pytest.fixture(scope='module')
def windows(tiny_model):
  return written(tiny_model, 5, length=8, seed=3, batch=4)


def test_windows_start_anywhere_go_on_surely_and_then_by_chance(tiny_model, windows):
  ids = jnp.asarray(windows.array)
  logits = jax.jit(lambda p: tiny_model.module.apply({'params': p}, ids)[0])(tiny_model.params)
  best = np.asarray(jnp.argmax(logits, axis=-1))[:, :-1]
  followed = windows.array[:, 1:] == best
  assert windows.array.shape == (5, 8) and len(set(windows.array[:, 0])) > 1
  assert followed[:, :SURE].all() and not followed[:, SURE:].all()


def test_a_seed_gives_the_same_windows_and_another_gives_others(tiny_model, windows):
  again, other = (written(tiny_model, 5, length=8, seed=s, batch=4) for s in (3, 4))
  np.testing.assert_array_equal(again.array, windows.array)
  assert again.fingerprint == windows.fingerprint != other.fingerprint


@pytest.mark.parametrize(('count', 'length'), [(0, 8), (1, SURE + 1), (1, 65)])
def test_what_cannot_be_written_is_refused(tiny_model, count, length):
  with pytest.raises(InputError, match='give'):
    written(tiny_model, count, length=length)
