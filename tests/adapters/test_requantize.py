"""Adapters merged into integers: the values, and what the report says of them."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters.lora import lora
from lean_jax.adapters.requantize import requantize, requantize_lora
from lean_jax.errors import InputError
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.weights import Dense, LowRank, Quantized, Rescaled

VALUE = np.random.default_rng(0).normal(size=(8, 6))
W = Dense(jnp.asarray(VALUE, jnp.float32), 'io', (None, None))


def adapted(w, size):
  low = lora(w, 2, 4., key=jax.random.key(1))
  return dataclasses.replace(low, b=size * jax.random.normal(jax.random.key(2), low.b.shape))


def test_the_sum_is_rounded_to_the_scheme_of_the_base_and_its_error_reported():
  params = {'a': {'kernel': adapted(rtn(W, 'w4a16-g4'), .3)}, 'b': {'kernel': W}}
  out, errors = requantize(params)
  made = out['a']['kernel']
  assert isinstance(made, Quantized) and str(made.spec) == 'w4a16-g4'
  np.testing.assert_array_equal(out['b']['kernel'].value, W.value)
  assert errors.keys() == {'a/kernel'}
  before = np.asarray(params['a']['kernel'].unbox(), np.float64)
  groups = before.reshape(2, 4, 6)
  step = np.abs(groups).max(1) / 7
  step = np.asarray(jnp.asarray(step, jnp.bfloat16), np.float64)[:, None]
  want = (np.clip(np.round(groups / step), -8, 7) * step).reshape(8, 6)
  np.testing.assert_allclose(made.unbox(), want, atol=1e-5)
  error = np.linalg.norm(want - before) / np.linalg.norm(before)
  np.testing.assert_allclose(errors['a/kernel'], error, rtol=1e-3)
  assert .01 < error < .2


def test_an_adapter_smaller_than_a_step_is_lost_altogether():
  base = rtn(W, 'w8a16')
  out, errors = requantize({'kernel': adapted(base, 1e-5)})
  np.testing.assert_allclose(out['kernel'].unbox(), base.unbox(), rtol=1e-4)
  assert 0 < errors['kernel'] < 1e-3


def test_rescaled_inputs_keep_their_scales():
  by = jnp.linspace(.5, 2., 8)
  w = adapted(Rescaled(rtn(W, 'w8a16'), by), .3)
  made = requantize_lora(w)
  assert isinstance(made, Rescaled) and isinstance(made.base, Quantized)
  np.testing.assert_array_equal(made.by, by)
  # half a step of the largest of a column, times the largest scale
  np.testing.assert_allclose(made.unbox(), w.unbox(), atol=2 * 4 / 127)


def test_adapters_upon_adapters_are_merged_at_once():
  w = adapted(adapted(rtn(W, 'w8a16'), .3), .2)
  made = requantize_lora(w)
  assert isinstance(made, Quantized)
  np.testing.assert_allclose(made.unbox(), w.unbox(), atol=4 / 127)


@pytest.mark.parametrize('base', [W, fake_quantize(W, 'w4a16')])
def test_an_adapter_on_a_weight_that_is_not_rounded_is_refused(base):
  with pytest.raises(InputError, match='use merge'):
    requantize({'kernel': adapted(base, .3)})


def test_a_model_goes_through_training_on_integers_and_back_to_integers(tiny_model):
  with pytest.raises(InputError, match='no weight has an adapter'):
    lean.requantize(tiny_model)
  model = lean.attach_lora(lean.quantize(tiny_model, 'w4a16-g16'), rank=2)
  model = dataclasses.replace(model, params=tree.transform(model.params, [
      ('.*/q/.*', lambda w: dataclasses.replace(w, b=w.b + .1)), ('.*', None)]))
  made, errors = lean.requantize(model)
  assert not any(isinstance(w, LowRank) for w in tree.named_weights(made.params).values())
  assert tree.nbytes(made.params) < tree.nbytes(model.params)
  assert errors['layers/attention/q/kernel'] == max(errors.values())
  tokens = np.arange(12).reshape(2, 6)
  assert np.isfinite(np.asarray(made.logits(tokens))).all()
