"""Rotary positions against transformers' own, from every spelling of config.json and back."""
import copy

import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.models.families.rope_config import context, rope_hf, ropes
from lean_jax.nn.rope import Rope, rotation
from lean_jax.nn.rope_scaling import Llama3, LongRope, Yarn

K, LONGEST = 24, 64
HF = dict(max_position_embeddings=LONGEST)
SHORT, LONG = [1 + .1 * k for k in range(K // 2)], [2 + .5 * k for k in range(K // 2)]
# rope_scaling without its type, and the lengths at which it is compared.
YARN = dict(factor=4., original_max_position_embeddings=16)
CASES = {
    'default': ({}, [40]),
    'linear': (dict(factor=4.), [40]),
    'dynamic': (dict(factor=3.), [5, 64, 65, 150]),
    'yarn': (YARN, [64]),
    'yarn, its ratio': (YARN | dict(mscale=1.5, mscale_all_dim=.7, beta_fast=8, beta_slow=2), [64]),
    'yarn, its factor': (YARN | dict(attention_factor=1.3, truncate=False), [64]),
    'longrope': (dict(short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=16),
                 [15, 16, 17, 60]),
    'longrope, its factor': (dict(short_factor=SHORT, long_factor=LONG, attention_factor=1.4,
                                  original_max_position_embeddings=16), [16, 17]),
    'llama3': (dict(factor=8., low_freq_factor=1., high_freq_factor=4.,
                    original_max_position_embeddings=32), [64]),
    'proportional': (dict(factor=2., partial_rotary_factor=.5), [40]),
}


def spellings(kind, scaling):
  """config.json of transformers 4 and 5."""
  named = dict(rope_type=kind) | scaling
  yield HF | dict(rope_theta=500., rope_scaling=named)
  yield HF | dict(rope_parameters=named | dict(rope_theta=500.))


def theirs(hf, length):
  """transformers' cosines and sines of Llama, [length R]."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
  config = transformers.LlamaConfig(hidden_size=2 * K, num_attention_heads=2,
                                    **copy.deepcopy(hf))
  cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
  return [h[0].numpy() for h in (cos, sin)]


def ours(rope, length):
  cos, sin = rotation(rope, jnp.arange(length)[None], K)
  return [np.concatenate([h[0], h[0]], axis=-1) for h in (cos, sin)]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', CASES)
def test_each_kind_is_that_of_transformers_and_is_written_back(what):
  kind, (scaling, lengths) = what.split(',')[0], CASES[what]
  for hf in spellings(kind, scaling):
    found = ropes(hf, K)
    back = rope_hf(found, context(hf, found))
    assert ropes(back, K) == found
    for length in lengths:
      for source in (hf, back):
        # Angles up to 150 radians in float32.
        np.testing.assert_allclose(ours(found[0], length), theirs(source, length), atol=3e-5)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', ['default', 'linear', 'yarn', 'llama3'])
def test_far_positions_are_those_of_transformers(kind):
  scaling = dict(rope_type=kind) | CASES[kind][0]
  if kind in ('yarn', 'llama3'):
    scaling['original_max_position_embeddings'] = 8192
  hf = dict(max_position_embeddings=2 ** 17, rope_theta=5e5, rope_scaling=scaling)
  # All but a few small frequencies are the same float32.
  for a, b in zip(ours(ropes(hf, K)[0], 2 ** 17), theirs(hf, 2 ** 17)):
    np.testing.assert_allclose(a[-8:], b[-8:], atol=2e-4)


def test_the_length_of_training_beside_the_object_counts():
  llama = dict(rope_type='llama3', factor=8, low_freq_factor=1, high_freq_factor=4)
  hf = HF | dict(rope_scaling=llama)
  assert ropes(hf, K)[0].scaling == Llama3(8., 1., 4., LONGEST)
  both = hf | dict(rope_scaling=llama | dict(original_max_position_embeddings=8))
  assert ropes(both, K)[0].scaling.original == 8
  assert ropes(both | dict(original_max_position_embeddings=16), K)[0].scaling.original == 16


def test_positions_stretch_the_context():
  for scaling, longest in ((dict(type='dynamic', factor=3.), 192), (dict(type='yarn', **YARN), 64),
                           (dict(type='yarn', factor=4.), 256),
                           (dict(type='linear', factor=4.), 64)):
    hf = HF | dict(rope_scaling=scaling)
    found = ropes(hf, K)
    assert context(hf, found) == longest
    assert ropes(rope_hf(found, longest), K) == found


def test_layers_with_a_window_may_have_their_own():
  local = dict(theta=1e6, local_theta=1e4)
  far, near = ropes(HF, K, **local)
  assert (far, near) == (Rope(1e6), Rope(1e4))
  linear = dict(rope_type='linear', factor=8.)
  old = HF | dict(rope_theta=5e5, rope_local_base_freq=100., rope_scaling=linear)
  new = HF | dict(rope_parameters=dict(
      full_attention=linear | dict(rope_theta=5e5),
      sliding_attention=dict(rope_type='default', rope_theta=100.)))
  found = ropes(old, K, **local)
  assert found == ropes(new, K, **local)
  assert rope_hf(found, LONGEST) == old
  both = HF | dict(rope_parameters=dict(
      sliding_attention=dict(rope_type='yarn', rope_theta=100., **YARN)))
  found = ropes(both, K, **local)
  assert found == (Rope(1e6), Rope(100., scaling=Yarn(4., 16)))
  assert ropes(rope_hf(found, LONGEST), K, **local) == found


def test_a_part_of_a_head_turns_where_the_family_can():
  hf = HF | dict(partial_rotary_factor=.5)
  found = ropes(hf, K, partial=True)
  assert found == (Rope(fraction=.5),) and found[0].width(K) == 12
  assert found == ropes(HF | dict(rope_parameters=dict(partial_rotary_factor=.5)), K, partial=True)
  assert ropes(rope_hf(found, LONGEST), K, partial=True) == found
  scaling = dict(type='longrope', short_factor=SHORT[:6], long_factor=LONG[:6])
  rope, = ropes(hf | dict(rope_scaling=scaling), K, partial=True)
  assert rope.scaling == LongRope(tuple(SHORT[:6]), tuple(LONG[:6]), LONGEST)


@pytest.mark.parametrize(('change', 'words'), [
    (dict(rope_scaling=dict(type='spiral')), ['rope_scaling', "'spiral'", 'llama3']),
    (dict(rope_parameters=dict(rope_type='mrope')), ['rope_parameters', "'mrope'"]),
    (dict(rope_scaling=dict(type='linear')), ['factor = None']),
    (dict(rope_scaling=dict(type='linear', factor=-1)), ['factor = -1']),
    (dict(rope_scaling=dict(type='linear', factor=2, beta=3)), ['linear', 'beta = 3', 'factor']),
    (dict(rope_parameters=dict(mrope_section=[2, 2])), ['mrope_section = [2, 2]']),
    (dict(rope_parameters=dict(full_attention=dict(rope_type='default'))), ['full_attention']),
    (dict(rope_scaling=dict(type='llama3', factor=8., low_freq_factor=4., high_freq_factor=1.)),
     ['low_freq_factor = 4', 'high_freq_factor = 1']),
    (dict(rope_scaling=dict(type='longrope', short_factor=[1.], long_factor=LONG)),
     ['short_factor = [1.0]', '12 positive numbers']),
    (dict(rope_scaling=dict(type='longrope', short_factor=SHORT, long_factor=[0] * 12)),
     ['long_factor']),
    (dict(rope_scaling=dict(type='dynamic', factor=2., original_max_position_embeddings=8)),
     ['dynamic', '8', '64']),
    (dict(rope_scaling=[2]), ['rope_scaling = [2]', 'object']),
    (dict(rope_theta=0), ['rope_theta = 0']),
    (dict(partial_rotary_factor=.5), ['partial_rotary_factor = 0.5', '24', 'all of them']),
])
def test_what_is_unknown_or_wrong_is_named(change, words):
  with pytest.raises(InputError) as error:
    ropes(HF | change, K)
  assert all(word in str(error.value) for word in words), error.value
  assert '\n' not in str(error.value)


def test_an_odd_part_of_a_head_is_refused():
  for fraction in (.3, .01, 1.5):
    with pytest.raises(InputError, match='an even number'):
      ropes(HF | dict(partial_rotary_factor=fraction), K, partial=True)
