import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import tree
from lean_jax.adapters.lora import lora
from lean_jax.distillation.start import take_layers
from lean_jax.interop import hf
from lean_jax.models.config import Layer, StackConfig
from lean_jax.models.decoder import Decoder, DecoderConfig, empty_cache
from lean_jax.models.encoder_decoder import EncoderDecoderConfig
from lean_jax.models.segments import (
  converted,
  located,
  restacked,
  segments,
  uniform,
  unstacked,
)
from lean_jax.quantization.rtn import rtn

KINDS = dict(a=Layer(), b=Layer(feed_forward=None), m=Layer('mamba'), e=Layer('mamba', 'moe'),
             x=Layer('attention', 'moe'), f=Layer(mixer_norm=False))
# Uniform; a beginning of another kind; periods, with a beginning and once; neither.
PATTERNS = ('aaaa', 'bbaaaa', 'abababab', 'babab', 'ab', 'babbabaa')


def config_of(pattern, **kw):
  kinds = tuple(KINDS[letter] for letter in pattern)
  return DecoderConfig(**dict(
      vocabulary=16, width=8, layers=len(kinds), heads=2, groups=1, head_width=4, hidden=16,
      context=16, kinds=kinds) | kw)


def cut(pattern):
  """[(first layer, kinds, count)] of the segments."""
  names = {(layer.mixer, layer.feed_forward, layer.mixer_norm): letter
           for letter, layer in KINDS.items()}
  return [(s.first, ''.join(names[kind] for kind in s.kinds), s.count)
          for s in segments(config_of(pattern))]


@functools.cache
def made(pattern, scan=True):
  """A config and random parameters, without compiling a model."""
  config, rng = config_of(pattern, scan_layers=scan), np.random.default_rng(0)
  return config, jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), hf.abstract(config))


METHODS = dict(
    dense=lambda w: w,
    quantized=functools.partial(rtn, spec='w4a16-g8'),
    low_rank=functools.partial(lora, rank=2, alpha=4., key=jax.random.key(0)),
    both=lambda w: lora(rtn(w, 'w8a8'), 2, 4., key=jax.random.key(0)))


@functools.cache
def layers_of(pattern, method):
  """A config, and its tree under 'layers' of the weights that a method makes."""
  config, params = made(pattern)
  return config, tree.transform(params, [('layers/.*', METHODS[method])])['layers']


def assert_same(one, other):
  """Trees are equal, the kinds of weights and the names of their axes included."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(('pattern', 'expected'), [
    ('aaaa', [(0, 'a', 4)]),
    ('a', [(0, 'a', 1)]),
    ('mmmxxxxx', [(0, 'm', 3), (3, 'x', 5)]),                       # DeepSeek
    ('memeaeme' * 3, [(0, 'memeaeme', 3)]),                         # Jamba
    ('m' + 'ax' * 3, [(0, 'm', 1), (1, 'ax', 3)]),
    ('a' * 30 + 'b', [(0, 'a', 30), (30, 'b', 1)]),
    ('faaaa', [(0, 'f', 1), (1, 'a', 4)]),                          # ModernBERT
    ('abbbamm', [(0, 'a', 1), (1, 'b', 3), (4, 'a', 1), (5, 'm', 2)]),
])
def test_layers_are_cut_so_that_the_fewest_are_compiled(pattern, expected):
  assert cut(pattern) == expected


@pytest.mark.parametrize('pattern', PATTERNS)
def test_segments_are_all_layers_in_their_order(pattern):
  for scan in (True, False):
    config = config_of(pattern, scan_layers=scan)
    kinds = [kind for s in segments(config) for kind in s.kinds * s.count]
    assert kinds == [(layer.mixer, layer.feed_forward, layer.mixer_norm) for layer in config.each]
    lengths = [len(s.kinds) * s.count for s in segments(config)]
    assert [s.first for s in segments(config)] == np.cumsum([0, *lengths])[:-1].tolist()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('pattern', PATTERNS)
def test_stacking_is_the_inverse_of_unstacking(pattern, method):
  config, layers = layers_of(pattern, method)
  each = unstacked(config, layers)
  assert len(each) == config.layers
  assert_same(restacked(config, each), layers)
  for weight in tree.named_weights(each).values():
    assert 'n' not in weight.dims and len(weight.dims) == len(weight.axes) == len(weight.shape)
  written_out = dataclasses.replace(config, scan_layers=False)
  assert_same(unstacked(written_out, restacked(written_out, each)), each)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('pattern', PATTERNS)
def test_a_weight_taken_from_a_stack_is_the_same_part_of_its_dense_value(pattern, method):
  config, layers = layers_of(pattern, method)
  each = unstacked(config, layers)
  for name, weight in tree.named_weights(layers).items():
    key, numbers = located(config, f'layers/{name}')
    for k, n in enumerate(numbers):
      part = tree.named_weights(each[n])[key.removeprefix('layers/')]
      # Products of one layer's factors and of all layers' round differently: float32.
      np.testing.assert_allclose(part.unbox(), weight.unbox()[k], atol=1e-6)


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('pattern', PATTERNS)
def test_located_says_where_unstacking_puts_each_leaf(pattern, scan):
  config, params = made(pattern, scan)
  each = [tree.named_arrays(layer) for layer in unstacked(config, params['layers'])]
  seen = []
  for name, leaf in tree.named_arrays(params).items():
    key, numbers = located(config, name)
    if not name.startswith('layers/'):
      assert (key, numbers) == (name, None)
      continue
    own = key.removeprefix('layers/')
    stacked = isinstance(numbers, tuple)
    assert stacked == scan
    for k, n in enumerate(numbers if stacked else (numbers,)):
      np.testing.assert_array_equal(each[n].pop(own), leaf[k] if stacked else leaf)
      seen.append(n)
  assert set(seen) == set(range(config.layers)) and not any(each)


def logits(config, params):
  """Of six tokens, without a cache and with one."""
  module, tokens = Decoder(config), jnp.arange(6)[None]
  return jax.jit(lambda p: (module.apply({'params': p}, tokens)[0], module.apply(
      {'params': p}, tokens, empty_cache(config, 1, 8))[0]))(params)


@pytest.mark.parametrize('pattern', ['aaaa', 'bbaaa', 'abab'])
def test_a_model_converted_between_stacked_and_written_out_has_the_same_logits(pattern):
  config, params = made(pattern)
  other = dataclasses.replace(config, scan_layers=False)
  converted = params | dict(layers=restacked(other, unstacked(config, params['layers'])))
  assert not hf.misfits(other, converted)
  stacked, written = logits(config, params), logits(other, converted)
  for one in (stacked[1], *written):
    # Sums are fused differently: float32, logits of order ten.
    np.testing.assert_allclose(one, stacked[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('pattern', PATTERNS)
def test_converting_there_and_back_gives_the_same_model(pattern, method):
  config, params = made(pattern)
  params = params | dict(layers=layers_of(pattern, method)[1])
  other, out = converted(config, params, False)
  assert other == dataclasses.replace(config, scan_layers=False)
  assert_same(out['layers'], restacked(other, unstacked(config, params['layers'])))
  assert out['embed'] is params['embed']
  again, back = converted(other, out, True)
  assert again == config
  assert_same(back, params)


def test_both_stacks_of_a_model_are_converted():
  both = dict(vocabulary=16, width=8, hidden=8, heads=2, groups=2, head_width=4, context=8)
  config = EncoderDecoderConfig(
      encoder=StackConfig(layers=2, causal=False, **both),
      decoder=DecoderConfig(layers=3, cross=True, **both), start=0)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), hf.abstract(config))
  other, out = converted(config, params, False)
  assert not (other.encoder.scan_layers or other.decoder.scan_layers or hf.misfits(other, out))
  assert [len(out[k]['layers']) for k in ('encoder', 'decoder')] == [2, 3]
  again, back = converted(other, out, True)
  assert again == config
  assert_same(back, params)


@pytest.mark.parametrize('method', ['dense', 'both'])
def test_a_student_has_the_layers_taken_and_their_kinds(method):
  config, params = made('abababab')
  params = params | dict(layers=layers_of('abababab', method)[1])
  taken = (0, 3, 5, 7)
  smaller, student = take_layers(config, params, taken)
  assert smaller.kinds == tuple(config.kinds[k] for k in taken)
  assert [(s.first, s.count) for s in segments(smaller)] == [(0, 1), (1, 3)]
  each = unstacked(config, params['layers'])
  for ours, k in zip(unstacked(smaller, student['layers']), taken):
    assert_same(ours, each[k])


def test_a_student_of_layers_of_one_kind_is_a_uniform_stack():
  config, params = made('abababab')
  smaller, student = take_layers(config, params, (1, 3))
  assert uniform(segments(smaller))
  assert not hf.misfits(smaller, student)
