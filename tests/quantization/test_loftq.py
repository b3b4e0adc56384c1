"""LoftQ against its algorithm in numpy, and against QLoRA's start."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import methods, tree
from lean_jax.adapters.lora import lora
from lean_jax.errors import InputError
from lean_jax.quantization.loftq import loftq
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.weights import Dense, LowRank, Quantized

SPEC = 'nf4-g8'
start = jax.jit(loftq, static_argnums=(1, 2, 3))
rounded = jax.jit(lambda w: rtn(w, SPEC).unbox())


def dense(*shape, dims='io'):
  return Dense(jax.random.normal(jax.random.key(0), shape), dims, (None,) * len(shape))


@functools.lru_cache
def found(steps):
  w = dense(16, 12)
  return np.asarray(w.value, np.float64), start(w, SPEC, 3, steps)


def alternated(w, steps):
  """Algorithm 1 in numpy."""
  low = np.zeros_like(w)
  for _ in range(steps):
    q = np.asarray(rounded(Dense(jnp.asarray(w - low, jnp.float32), 'io', (None, None))))
    u, s, v = np.linalg.svd(w - q)
    low = u[:, :3] * s[:3] @ v[:3]
  return q, low


@pytest.mark.parametrize('steps', [1, 5])
def test_it_is_the_algorithm(steps):
  w, made = found(steps)
  assert isinstance(made, LowRank) and isinstance(made.base, Quantized)
  q, low = alternated(w, steps)
  np.testing.assert_allclose(made.base.unbox(), q, atol=1e-5)
  np.testing.assert_allclose(made.a @ made.b * made.scale, low, atol=1e-5)


def test_the_adapter_takes_up_the_largest_singular_values_of_what_was_lost():
  w, made = found(1)
  q = np.asarray(rounded(dense(16, 12)))
  np.testing.assert_array_equal(made.base.unbox(), q)                  # one step: Q is QLoRA's
  rest = np.sum(np.linalg.svd(w - q, compute_uv=False)[3:] ** 2)      # Eckart and Young
  np.testing.assert_allclose(np.sum((np.asarray(made.unbox()) - w) ** 2), rest, rtol=1e-4)


def test_more_steps_come_nearer_to_the_weight():
  error = lambda steps: np.linalg.norm(np.asarray(found(steps)[1].unbox()) - found(steps)[0])
  plain = np.linalg.norm(np.asarray(rounded(dense(16, 12))) - found(1)[0])
  assert error(5) < error(1) < .9 * plain


@pytest.mark.parametrize(('shape', 'dims'), [((2, 16, 12), 'nio'), ((2, 12, 16), 'noi'),
                                             ((2, 3, 16, 12), 'neio'), ((2, 2, 8, 3, 4), 'niioo')])
def test_stacked_layers_and_experts_are_matrices_of_their_own(shape, dims):
  w = dense(*shape, dims=dims)
  made = start(w, SPEC, 3, 2)
  assert made.unbox().shape == shape
  one = Dense(w.value[1], dims[1:], (None,) * (len(shape) - 1))
  if dims[1] == 'e':
    one = Dense(w.value[1, 2], 'io', (None, None))
  np.testing.assert_allclose(made.unbox()[(1, 2) if dims[1] == 'e' else 1],
                             start(one, SPEC, 3, 2).unbox(), atol=1e-5)


def test_it_is_a_method_of_rules():
  params = {'a': {'kernel': dense(16, 12)}}
  out = methods.apply(params, (dict(where='.*', method='loftq', spec='nf4-g8-dq', rank=2,
                                    steps=2),))
  assert out['a']['kernel'].base.spec.double
  with pytest.raises(InputError, match='already|loftq'):
    loftq(out['a']['kernel'], SPEC, 2)


@pytest.mark.parametrize(('w', 'spec', 'rank', 'steps', 'match'), [
    (dense(16, 12), SPEC, 13, 1, 'rank 13'), (dense(16, 12), SPEC, 0, 1, 'rank 0'),
    (dense(16, 12), SPEC, 2, 0, '0 steps'), (dense(16, 12), 'w8a8-static', 2, 1, 'range'),
    (fake_quantize(dense(16, 12), 'w4a16'), SPEC, 2, 1, 'FakeQuantized')])
def test_what_cannot_be_is_refused_in_one_line(w, spec, rank, steps, match):
  with pytest.raises(InputError, match=match) as error:
    loftq(w, spec, rank, steps)
  assert '\n' not in str(error.value)


def test_qlora_over_nf4_with_double_quantization_has_4127_bits_a_parameter():
  """Dettmers et al. 2023, section 3: 4 bits, and .127 for the scales' constants."""
  w = lora(rtn(dense(256, 256), 'nf4-g64-dq'), 8, 16., key=jax.random.key(0))
  assert round(tree.nbytes(w.base) * 8 / 256 ** 2, 3) == 4.127
  assert tree.nbytes(w) - tree.nbytes(w.base) == 4 * 8 * (256 + 256)
