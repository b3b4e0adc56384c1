"""Fresh models of a family: from its name, from a config.json, like another model."""
import jax
import numpy as np
import pytest

import lean_jax as lean

LLAMA = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)


def test_a_seed_draws_the_same_weights_and_another_draws_others(tiny_model):
  one, same, other = (lean.create(tiny_model, seed=s) for s in (1, 1, 2))
  assert one.config == tiny_model.config
  assert jax.tree.structure(one.params) == jax.tree.structure(tiny_model.params)
  jax.tree.map(np.testing.assert_array_equal, one.params, same.params)
  table = lambda m: np.asarray(m.params['embed']['table'].value)
  assert np.abs(table(one) - table(other)).max() > .01


def test_settings_are_keys_of_config_json(tiny_model):
  made = lean.create('llama', tiny_model.tokenizer, **LLAMA)
  again = lean.create(dict(LLAMA, model_type='llama'), tiny_model.tokenizer, num_hidden_layers=2)
  assert (made.config.width, made.config.layers, again.config.layers) == (16, 1, 2)
  assert made.config.vocabulary == tiny_model.tokenizer.size
  smaller = lean.create(tiny_model, num_hidden_layers=1)
  assert smaller.config.layers == 1 and smaller.config.width == tiny_model.config.width


@pytest.mark.parametrize(('like', 'settings', 'message'), [
    ('llamma', {}, "model_type 'llamma'"), ('llama', dict(width=16), "a llama has no 'width'"),
    ('llama', LLAMA | dict(vocab_size=5), 'vocab_size 5 and a tokenizer of'),
    ('llama', dict(num_hidden_layers=0), 'num_hidden_layers')])
def test_models_that_cannot_be_made_are_refused(tiny_model, like, settings, message):
  with pytest.raises(lean.InputError, match=message):
    lean.create(like, tiny_model.tokenizer, **settings)


def test_a_tokenizer_is_needed():
  with pytest.raises(lean.InputError, match='no tokenizer'):
    lean.create('llama')
