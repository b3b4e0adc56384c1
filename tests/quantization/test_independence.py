"""What a model computes depends on its own weights alone: not on what was traced before it, not on
which weights look alike, and products without a weight stay float. Other libraries fail these."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import methods, tree
from lean_jax.calibration.statistics import of_matrix
from lean_jax.errors import InputError
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.models.segments import converted
from lean_jax.quantization.gptq import gptq
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense

CONFIG = DecoderConfig(vocabulary=32, width=16, layers=2, heads=2, groups=2, head_width=8,
                       hidden=16, context=8)                   # each matrix is 16 x 16
TOKENS = jnp.arange(16).reshape(2, 8)


@functools.cache
def params(dtype='float32'):
  module = Decoder(DecoderConfig(**{**vars(CONFIG), 'dtype': dtype}))
  return module, jax.jit(module.init)(jax.random.key(0), TOKENS)['params']


def apply(kind, spec, dtype='float32', where='layers/.*'):
  module, plain = params(dtype)
  return module, methods.apply(plain, (dict(where=where, method=kind, spec=spec),))


@pytest.mark.parametrize('order', [(0, 1), pytest.param((1, 0), marks=pytest.mark.slow)])
def test_a_plain_and_a_quantized_model_do_not_meet_in_a_jit_cache(order):
  module, plain = params()
  _, lean = apply('fake_quantize', 'w2a16-g8')
  run = jax.jit(lambda p: module.apply({'params': p}, TOKENS)[0])
  found = {k: run((plain, lean)[k]) for k in order}
  for k, p in enumerate((plain, lean)):
    want = module.apply({'params': jax.tree.map(jnp.asarray, p)}, TOKENS)[0]
    np.testing.assert_allclose(found[k], want, atol=1e-5)
  assert float(jnp.abs(found[0] - found[1]).max()) > .01


@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_nor_do_they_in_a_function_that_multiplies_by_itself(order):
  """x @ w of a dense value, as any foreign module does it."""
  plain = Dense(jnp.linspace(-1, 1, 128).reshape(16, 8), 'io', (None, None))
  weights, x = (plain, fake_quantize(plain, 'w2a16')), jnp.ones((4, 16)) / 3
  run = jax.jit(lambda w, x: x @ w.unbox())
  found = {k: run(weights[k], x) for k in order}
  for k, w in enumerate(weights):
    np.testing.assert_allclose(found[k], x @ w.unbox(), atol=1e-6)
  assert float(jnp.abs(found[0] - found[1]).max()) > .01


@pytest.mark.parametrize('dtype', ['float32', pytest.param('bfloat16', marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ['gate', 'up', 'q', 'k', 'v', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('down', 'o'))])
def test_weights_of_one_shape_are_each_rounded_under_grad(dtype, name):
  """The gradient of every other weight is that of the model with `name` rounded."""
  module, lean = apply('fake_quantize', 'w2a16-g8', dtype, where=f'layers/.*/{name}/.*')
  _, plain = params(dtype)
  loss = jax.jit(jax.grad(lambda p: jnp.mean(module.apply({'params': p}, TOKENS)[0] ** 2)))
  value = lambda w, r: w.replace_boxed(r.unbox()) if tree.is_weight(w) else w
  rounded = jax.tree.map(value, plain, lean, is_leaf=tree.is_weight)
  table = lambda g: g['embed']['table'].value
  got, want, float_one = table(loss(lean)), table(loss(rounded)), table(loss(plain))
  scale = float(jnp.abs(want).max())
  np.testing.assert_allclose(got, want, atol=(.05 if dtype == 'bfloat16' else 1e-5) * scale)
  assert float(jnp.abs(got - float_one).max()) > 1e-3 * scale


def products(jaxpr):
  """(operand dtypes) of every dot_general, inside loops and calls too, each counted once."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield tuple(str(v.aval.dtype) for v in eqn.invars)
    for name, value in eqn.params.items():
      if name == 'branches':                             # an op's forms: that of any platform
        value = value[-1:]
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from products(inner)


def test_a_broad_w8a8_rule_rounds_the_weights_products_and_no_other():
  module, lean = apply('rtn', 'w8a8', where='.*')
  run = lambda p: module.apply({'params': p}, TOKENS)[0]
  found = list(products(jax.make_jaxpr(run)(lean).jaxpr))
  integer = [d for d in found if d == ('int8', 'int8')]
  assert len(integer) == 7 + 1                         # a layer's weights, and the head
  assert all(d == ('float32', 'float32') for d in found if d not in integer)
  assert len(found) > len(integer)                     # attention's own products are there, float


def test_stacked_layers_are_rounded_as_each_would_be_by_itself():
  module, lean = apply('rtn', 'w4a16-g8')
  config, apart = converted(module.config, lean, False)
  _, plain = converted(module.config, params()[1], False)
  want = methods.apply(plain, (dict(where='layers/.*', method='rtn', spec='w4a16-g8'),))
  assert len(tree.named_weights(apart)) == 7 * config.layers + 1
  jax.tree.map(np.testing.assert_array_equal, apart, want)


def test_gptq_is_that_of_each_layer_and_of_each_expert():
  """Elsewhere stacked layers get wrong scales, and experts are silently rounded to nearest."""
  draw = np.random.default_rng(0).normal
  value = jnp.asarray(draw(size=(2, 2, 16, 4)), jnp.float32)
  mixed = draw(size=(2, 2, 64, 4)) @ draw(size=(2, 2, 4, 16)) + .1 * draw(size=(2, 2, 64, 16))
  stats = of_matrix(jnp.asarray(mixed, jnp.float32))
  w = Dense(value, 'neio', (None,) * 4)
  found = jax.jit(lambda w, stats: gptq(w, 'w2a16-g8', stats))(w, stats)
  rounded = rtn(w, 'w2a16-g8')
  np.testing.assert_array_equal(found.scale, rounded.scale)
  error = lambda v: np.sum((mixed @ np.asarray(v.unbox() - value)) ** 2, axis=(2, 3))
  assert np.all(error(found) < .7 * error(rounded))


def test_four_bit_activations_are_refused_and_not_left_to_the_compiler():
  with pytest.raises(InputError, match="no scheme 'w4a4'.*w4a8"):
    parse_spec('w4a4')
