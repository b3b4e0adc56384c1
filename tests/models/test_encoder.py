import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import tree
from lean_jax.distillation.start import take_layers
from lean_jax.interop import hf
from lean_jax.models.config import Layer
from lean_jax.models.encoder import EncoderConfig, TransformOptions
from lean_jax.models.segments import converted
from lean_jax.nn.attention import AttentionOptions
from lean_jax.nn.mlp import MLPOptions
from lean_jax.nn.rope import Rope
from lean_jax.training.mesh import make_mesh, on, put_batch, shardings

BASE = dict(vocabulary=40, width=16, layers=2, heads=2, groups=2, head_width=8, hidden=24,
            context=32, norm='layer', embedding_norm=True)
# As BERT is, and as ModernBERT is: sums normalised; inputs, windows in two layers of three.
OLD = EncoderConfig(**BASE, norm_before=False, norm_sum=True, final_norm=False, positions=32,
                    token_types=2, attention=AttentionOptions(ropes=(), bias=True),
                    mlp=MLPOptions(gated=False, activation='gelu', bias=True), head='masked',
                    transform=TransformOptions(norm=True))
NEAR = Layer(window=3, rotary=1)
NEW = EncoderConfig(**BASE | dict(layers=4), kinds=(Layer(mixer_norm=False), NEAR, NEAR, Layer()),
                    attention=AttentionOptions(ropes=(Rope(100.), Rope(10.))), head='token',
                    norm_bias=False, transform=TransformOptions(bias=False, norm=True),
                    labels=('a', 'b', 'c'))
CONFIGS = dict(old=OLD, new=NEW)
TOKENS = np.random.default_rng(0).integers(1, 40, (4, 9))
LENGTHS = np.array([9, 6, 9, 2])
MASK = np.arange(9)[None] < LENGTHS[:, None]


@pytest.fixture(scope='module', params=CONFIGS)
def model(request):
  """(config, params, the jitted module)."""
  config = CONFIGS[request.param]
  params = jax.jit(config.module.init)(jax.random.key(0), TOKENS)['params']
  return config, params, jax.jit(lambda p, *given: config.module.apply({'params': p}, *given)[0])


def near(one, other):
  # float32, outputs of order one.
  np.testing.assert_allclose(one, other, atol=1e-5)


def test_each_token_sees_those_before_and_after(model):
  _, params, run = model
  outputs = run(params, TOKENS)
  for place in (0, 8):
    other = TOKENS.copy()
    other[:, place] = (other[:, place] + 1) % 40
    assert (np.abs(run(params, other) - outputs).max(axis=2) > 1e-7).all()


def test_padding_is_not_seen_wherever_it_stands(model):
  _, params, run = model
  outputs = np.asarray(run(params, TOKENS, MASK))
  near(np.asarray(run(params, np.where(MASK, TOKENS, 5), MASK))[MASK], outputs[MASK])
  assert np.abs(np.asarray(run(params, TOKENS)) - outputs)[MASK].max() > 1e-3
  left = lambda x: np.stack([np.roll(row, 9 - n, axis=0) for row, n in zip(x, LENGTHS)])
  moved = np.asarray(run(params, left(TOKENS), left(MASK)))
  near(moved[left(MASK)], outputs[MASK])


def test_layers_written_out_are_the_same_model(model):
  config, params, run = model
  other, unrolled = converted(config, params, False)
  near(jax.jit(lambda p: other.module.apply({'params': p}, TOKENS)[0])(unrolled),
       run(params, TOKENS))
  back, again = converted(other, unrolled, True)
  assert back == config
  jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_student_begins_with_the_first_layer(model):
  config, params, _ = model
  smaller, taken = take_layers(config, params, (0, config.layers - 1))
  assert smaller.layers == 2 and smaller.each == (config.each[0], config.each[-1])
  assert hf.misfits(smaller, taken) == []


def test_a_mesh_gives_what_one_device_gives(model):
  config, params, run = model
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  placed = jax.device_put(params, shardings(params, mesh))
  batch = put_batch(dict(tokens=TOKENS, mask=MASK), mesh)
  with on(mesh):
    found = jax.jit(lambda p, b: config.module.apply({'params': p}, **b)[0])(placed, batch)
  near(np.asarray(found)[MASK], np.asarray(run(params, TOKENS, MASK))[MASK])


HEADS = {
    'masked': (dict(), (4, 9, 40), {'transform/dense/kernel'}),
    'masked, its own': (dict(tied=False), (4, 9, 40), {'transform/dense/kernel', 'head/kernel'}),
    'token': (dict(head='token', labels=('a', 'b'), transform=None), (4, 9, 2),
              {'classifier/kernel'}),
    'sequence': (dict(head='sequence', labels=('a', 'b')), (4, 2),
                 {'classifier/kernel', 'transform/dense/kernel'}),
    'bare': (dict(head=None, transform=None), (4, 9, 16), set()),
    'bare, with a pooler': (dict(head=None), (4, 9, 16), {'transform/dense/kernel'}),
}


@pytest.mark.parametrize('head', HEADS)
def test_a_head_has_its_weights_and_gives_its_shape(head):
  changes, shape, weights = HEADS[head]
  config = dataclasses.replace(OLD, dtype='bfloat16', **changes)
  like = hf.abstract(config)
  found = {name for name in tree.named_weights(like) if not name.startswith(
      ('layers', 'embed', 'positions', 'token_types'))}
  assert found == weights
  out, cache = jax.eval_shape(lambda p: config.module.apply({'params': p}, TOKENS), like)
  assert (out.shape, out.dtype, cache) == (shape, jnp.float32, None)


@pytest.mark.parametrize('reads', ['cls', 'mean'])
def test_a_head_of_sequences_reads_real_tokens_alone(reads):
  config = dataclasses.replace(OLD, head='sequence', labels=('a', 'b', 'c'), reads=reads)
  module = config.module
  params = jax.jit(module.init)(jax.random.key(0), TOKENS)['params']
  run = jax.jit(lambda p, *given: module.apply({'params': p}, *given)[0])
  whole = run(params, TOKENS, MASK)
  left = lambda x: np.stack([np.roll(row, 9 - n, axis=0) for row, n in zip(x, LENGTHS)])
  near(run(params, left(np.where(MASK, TOKENS, 5)), left(MASK)), whole)
  assert np.abs(run(params, TOKENS, MASK, np.ones((4, 9), int)) - whole).max() > 1e-3
