"""Several texts in a row: the same loss and gradients as of each by itself."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.data.example_windows import arranged
from lean_jax.data.examples import Example
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.models.families import family_of
from lean_jax.models.frame import check_segments
from lean_jax.objectives.forward import forward, targets
from lean_jax.objectives.language_modeling import next_token

CONFIGS = pathlib.Path(__file__).with_name('configs')
LENGTHS = (23, 13, 40, 19, 33)
# float32: sums of at most 64 terms in another order, through a few layers
ULP = 2. ** -23


def fresh(name, **change):
  hf = json.loads((CONFIGS / f'{name}.json').read_text()) | change
  module = family_of(hf).from_hf(hf).module
  ids = {k: jnp.zeros((1, 4), jnp.int32) for k in module.inputs}
  params = jax.jit(module.init)(jax.random.key(0), **ids)['params']
  rng = np.random.default_rng(1)
  stir = lambda x: x + .05 * rng.normal(size=x.shape).astype(np.float32)
  return module, jax.tree.map(stir, params)


def examples():
  rng = np.random.default_rng(0)
  make = lambda n: Example(rng.integers(3, 90, n).astype(np.int32), np.arange(n) > n // 3)
  return [make(n) for n in LENGTHS]


def gradient_of(module, params):
  """The function from a batch to the sum of its tokens' losses, and its gradients."""
  loss = next_token(module)

  def summed(params, batch):
    _, mask = targets(batch)
    return loss(params, batch, None)[0] * jnp.sum(mask)
  run = jax.jit(jax.value_and_grad(summed))
  return lambda batch: run(params, batch)


@pytest.mark.parametrize('name', ['llama', 'gpt2', *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ('gemma2', 'mixtral', 'deepseek_v3', 'gpt_oss', 'opt'))])
def test_a_packed_batch_has_the_loss_and_gradients_of_the_examples_one_by_one(name):
  fewer = dict(llama=dict(num_hidden_layers=1), gpt2=dict(n_layer=1)).get(name, {})
  module, params = fresh(name, **fewer)
  run = gradient_of(module, params)
  packed, alone = (arranged(examples(), 64, packed=packed) for packed in (True, False))
  assert packed.examples == 5 and len(packed) == 3 and packed.segments.max() == 2
  got, grads = run(packed.batch(np.arange(3)))
  each = [run(alone.batch(np.array([k]))) for k in range(5)]
  want, wanted = jax.tree.map(lambda *xs: sum(xs), *each)
  assert abs(got - want) <= 8 * ULP * want
  most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
    # a key's bias has none, and rounding errors of the size of the others' terms
    atol = 32 * ULP * max(float(jnp.abs(b).max()), .1 * most)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.slow
def test_the_losses_of_a_router_are_those_of_padded_rows():
  module, params = fresh('mixtral', output_router_logits=True)
  batches = [arranged(examples(), 64, packed=p) for p in (True, False)]
  one, other = (next_token(module)(params, b.batch(np.arange(len(b))), None)[0] for b in batches)
  np.testing.assert_allclose(one, other, rtol=4 * ULP)


def test_no_gradient_goes_from_one_text_of_a_row_to_another():
  module, params = fresh('llama', num_hidden_layers=1)
  tokens = np.random.default_rng(2).integers(3, 90, (1, 64))
  segments = np.repeat([1, 2, 0], [30, 24, 10])[None]
  run = jax.jit(lambda tokens: forward(module, params, dict(tokens=tokens, segments=segments))[0])
  want = run(tokens)
  other = np.where(segments == 1, 3 + tokens % 7, tokens)
  np.testing.assert_array_equal(run(other)[:, 30:54], want[:, 30:54])
  assert bool((run(other)[:, :30] != want[:, :30]).any())
  wanted, mask = targets(dict(tokens=tokens, segments=segments))
  assert np.flatnonzero(1 - mask[0]).tolist() == [29, *range(53, 64)]
  np.testing.assert_array_equal(wanted[0, :29], tokens[0, 1:30])


@pytest.mark.parametrize('name', ['mamba', 'lean_lstm', 'jamba'])
def test_a_model_with_a_state_refuses_segments(name):
  hf = json.loads((CONFIGS / f'{name}.json').read_text())
  with pytest.raises(InputError, match=r'carry a state .* padded'):
    check_segments(family_of(hf).from_hf(hf), None)
  with pytest.raises(InputError, match='segments with a cache'):
    check_segments(DecoderConfig(vocabulary=8, width=8, layers=1, context=8), {})
