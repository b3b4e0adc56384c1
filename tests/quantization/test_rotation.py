"""Rotations: orthogonal, seen by no logit, and seen by no rounding of outliers."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.errors import InputError
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.models.families import family_of
from lean_jax.objectives.forward import forward
from lean_jax.quantization.rotation import check, hadamard, rotate
from tests.models import methods_matrix as matrix

REASONS = dict(
    bart='no decoder', bert='no decoder', distilbert='no decoder', gemma2='after each branch',
    gemma3_text='after each branch', gpt2='mean', gpt_neox='mean', modernbert='no decoder',
    olmo2='without a norm', opt='mean', phi='mean', roberta='no decoder', t5='no decoder')
ROTATED = sorted(matrix.CONFIGS.keys() - REASONS)


def uneven(params):
  """The tree with norms' scales and biases unlike 1 and 0."""
  draw = np.random.default_rng(5).uniform
  return jax.tree.map(lambda x: x if x.ndim > 2 else x + np.float32(.3) * draw(size=x.shape).astype(
      np.float32), params)


@pytest.mark.parametrize('size', [1, 2, 12, 15, 64])
def test_a_random_rotation_is_orthogonal_and_spreads_each_channel_evenly(size):
  R = np.asarray(hadamard(jax.random.key(0), size), np.float64)
  np.testing.assert_allclose(R @ R.T, np.eye(size), atol=1e-6)
  power = size & -size
  # a channel goes to blocks of `power`, to all of one in equal parts
  block = np.abs(R).reshape(size, -1, power)
  np.testing.assert_allclose(block, np.broadcast_to(block[:, :, :1], block.shape), atol=1e-6)
  assert size < 2 or not np.allclose(R, hadamard(jax.random.key(1), size))


@pytest.mark.slow
@pytest.mark.parametrize('family', ROTATED)
def test_the_logits_stay_and_the_family_can_say_it(family):
  config, params = matrix.model(family)
  params, given = uneven(params), matrix.batch(config)
  turned_config, turned = rotate(config, params, jax.random.key(1))
  want = matrix.computed(config.module, params, given)
  got = matrix.computed(turned_config.module, turned, given)
  # float32 through a few layers
  np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), params['embed'], turned['embed'])
  assert max(jax.tree.leaves(moved)) > .01
  kind = family_of(matrix.json.loads(matrix.CONFIGS[family].read_text()))
  assert kind.from_hf(kind.to_hf(turned_config)) == turned_config


@pytest.mark.parametrize('family', REASONS)
def test_a_structure_that_no_rotation_passes_through_is_refused_with_the_reason(family):
  config = family_of(hf := matrix.json.loads(matrix.CONFIGS[family].read_text())).from_hf(hf)
  with pytest.raises(InputError, match=REASONS[family]) as error:
    check(config, {})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('change', [
    dict(parallel=True), dict(norm_sum=True), dict(embedding_norm=True), dict(embedding_width=8),
    dict(cross=True)])
def test_a_config_is_judged_by_its_fields(change, tiny_model):
  check(tiny_model.config, tiny_model.params)
  with pytest.raises(InputError, match='cannot be rotated'):
    check(dataclasses.replace(tiny_model.config, **change), tiny_model.params)


def test_positions_token_types_and_every_bias_turn_too():
  base = DecoderConfig(vocabulary=20, width=12, layers=2, heads=2, groups=1, head_width=6,
                       hidden=10, context=8)
  config = dataclasses.replace(
      base, positions=8, token_types=2, head_bias=True, norm_offset=1.,
      attention=dataclasses.replace(base.attention, bias=True, out_bias=True, norm='head'),
      mlp=dataclasses.replace(base.mlp, bias=True))
  tokens = jnp.arange(8).reshape(1, 8)
  params = uneven(jax.jit(Decoder(config).init)(jax.random.key(0), tokens)['params'])
  other, turned = rotate(config, params, jax.random.key(1))
  logits = lambda c, p: np.asarray(forward(c.module, p, dict(tokens=tokens))[0])
  want = logits(config, params)
  np.testing.assert_allclose(logits(other, turned), want, atol=2e-5 * np.abs(want).max())
  assert not other.tied and 'head_bias' not in turned


def test_what_stands_out_in_a_few_channels_no_longer_makes_eight_bits_coarse(tiny_model):
  """A norm's scale of 60 where others are 1, and the rows that read it a sixtieth."""
  layers = tiny_model.params['layers']
  norm = dict(scale=layers['mixer_norm']['scale'].at[:, 3].mul(60))
  small = lambda w: w.replace_boxed(w.value.at[:, 3].mul(1 / 60))
  attention = dict(layers['attention']) | {
      name: dict(kernel=small(layers['attention'][name]['kernel'])) for name in 'qkv'}
  model = dataclasses.replace(tiny_model, params=dict(tiny_model.params, layers=dict(
      layers, mixer_norm=norm, attention=attention)))
  tokens = np.arange(12).reshape(2, 6)
  want = np.asarray(tiny_model.logits(tokens))

  def off(m):
    return np.sqrt(np.mean((np.asarray(m.logits(tokens)) - want) ** 2))
  turned = lean.rotate(model, jax.random.key(1))
  assert off(model) < 1e-4 and off(turned) < 1e-4
  assert off(lean.quantize(turned, 'w8a8')) < off(lean.quantize(model, 'w8a8')) / 2


def test_a_rotated_model_is_saved_and_loaded(tiny_model, tmp_path):
  model = lean.rotate(tiny_model, jax.random.key(1))
  lean.save(model, tmp_path / 'out', format='hf')
  tokens = np.arange(12).reshape(2, 6)
  found = lean.load(tmp_path / 'out')
  np.testing.assert_allclose(found.logits(tokens), tiny_model.logits(tokens), atol=1e-4)


def test_what_is_rounded_already_is_not_rotated(tiny_model):
  with pytest.raises(InputError, match='Quantized weight; rotate the float'):
    lean.rotate(lean.quantize(tiny_model, 'w8a8'), jax.random.key(0))
