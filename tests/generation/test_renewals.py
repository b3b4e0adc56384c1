"""Positions that turn otherwise past a length (LongRoPE): what was cached before is made anew."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.generation import generate
from lean_jax.generation.writer import renewals
from lean_jax.models.decoder import DecoderConfig
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.rope import Rope
from lean_jax.nn.rope_scaling import LongRope

ORIGINAL = 6
ROPE = Rope(scaling=LongRope((1., 1.5, 2., 3.), (2., 5., 9., 20.), ORIGINAL, 1.2))
CONFIG = DecoderConfig(vocabulary=23, width=16, layers=2, heads=2, groups=2, head_width=8,
                       hidden=24, context=32, attention=AttentionOptions(ropes=(ROPE,)))


@functools.cache
def model():
  params = CONFIG.module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))['params']
  return CONFIG.module, jax.tree.map(lambda x: 3 * x, params)


@functools.cache
def forward():
  module, params = model()
  return jax.jit(lambda ids, mask: module.apply({'params': params}, ids, mask=mask)[0])


def whole(prompt, tokens):
  """Greedy tokens, each of a forward pass over all before it."""
  ids = np.zeros((1, 24), np.int32)
  ids[0, :len(prompt)] = prompt
  for at in range(len(prompt), len(prompt) + tokens):
    ids[0, at] = np.argmax(forward()(ids, np.arange(24)[None] < at)[0, at - 1])
  return ids[0, len(prompt):at + 1]


@pytest.mark.parametrize('length', [3, ORIGINAL, ORIGINAL + 1])
def test_text_past_the_length_is_that_of_whole_passes(length):
  prompt = np.random.default_rng(length).integers(0, 23, length)
  found = generate(*model(), prompt, tokens=12)
  np.testing.assert_array_equal(found, whole(prompt, 12))


def test_a_row_that_ended_before_stays_ended():
  prompts = np.random.default_rng(1).integers(0, 23, (2, 3))
  free = generate(*model(), prompts, tokens=12)
  eos = next(t for t in free[0, :ORIGINAL - 3] if t not in free[1])
  found = generate(*model(), prompts, tokens=12, eos=int(eos))
  first = list(free[0]).index(eos)
  np.testing.assert_array_equal(found[0], np.where(np.arange(12) < first, free[0], eos))
  np.testing.assert_array_equal(found[1], free[1])
  alone = generate(*model(), prompts[0], tokens=12, eos=int(eos))
  np.testing.assert_array_equal(alone, free[0, :first + 1])


def test_a_cache_is_made_anew_once_and_only_where_it_must_be():
  assert renewals(CONFIG, 3, 20) == [ORIGINAL + 1]
  assert renewals(CONFIG, ORIGINAL, 20) == [ORIGINAL + 1]
  assert renewals(CONFIG, ORIGINAL + 1, 20) == []
  assert renewals(CONFIG, 3, ORIGINAL + 1) == []
  assert renewals(CONFIG, 3, ORIGINAL + 2) == [ORIGINAL + 1]
