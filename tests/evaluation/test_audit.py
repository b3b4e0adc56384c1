"""The audit: what is asked is what is computed, and what is not is found."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lean_jax
from lean_jax import methods, tree
from lean_jax.errors import InputError, PrecisionError
from lean_jax.evaluation.audit import audit, audit_function
from lean_jax.kernels.fake_quant import reference
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.quantization.ema import ema
from lean_jax.quantization.lsq import lsq, lsq_plus
from lean_jax.quantization.pact import pact
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.spec import KNOWN, parse_spec
from lean_jax.weights import Dense, FakeQuantized, Quantized, Rescaled
from lean_jax.weights.base import Weight, pytree, static

FLOAT, INTEGER = 'float32 x float32', 'int8 x int8'
RIGHT = 'float32 x rounded float32'

# Arrays are shapes: nothing is computed.
CONFIG = DecoderConfig(vocabulary=32, width=64, layers=2, heads=2, groups=1, head_width=32,
                       hidden=128, context=8, remat=True)
MODULE, TOKENS = Decoder(CONFIG), np.zeros((2, 8), np.int32)
PLAIN = jax.eval_shape(MODULE.init, jax.random.key(0), TOKENS)['params']


def lean(*steps, where='layers/.*'):
  steps = tuple(dict(where=where) | step for step in steps)
  return jax.eval_shape(lambda p: methods.apply(p, steps, jax.random.key(1)), PLAIN)


def forms(params):
  """{(asked, forward, gradient)} of the layers' weights."""
  return {row[1:] for row in audit((MODULE, params), TOKENS) if row.name.startswith('layers')}


def test_a_plain_model_is_float_and_each_weight_has_a_row():
  rows = audit((MODULE, PLAIN), TOKENS)
  assert [r.name for r in rows] == list(tree.named_weights(PLAIN))
  assert {row[1:] for row in rows[1:]} == {('float32', FLOAT, FLOAT)}


@pytest.mark.parametrize(('method', 'spec', 'forward'), [
    ('rtn', 'w8a8', INTEGER), ('rtn', 'w4a16-g64', RIGHT),
    ('fake_quantize', 'w1.58a8', f'rounded {RIGHT}'), ('lsq_plus', 'w2a16', RIGHT)])
def test_a_model_is_read_under_scan_remat_and_gradient(method, spec, forward):
  (asked, *found), = forms(lean(dict(method=method, spec=spec)))
  assert spec in asked and found == [forward, RIGHT]


def test_an_adapter_and_its_base_have_a_row_each():
  qlora = lean(dict(method='rtn', spec='nf4-g64-dq'), dict(method='lora', rank=2, alpha=4.))
  assert forms(qlora) == {('float32', FLOAT, FLOAT), ('nf4-g64-dq', RIGHT, RIGHT)}


def test_a_broad_rule_rounds_the_weights_and_no_other_product():
  """Attention's two products, of inputs with inputs, stay float: qwix rounds them too."""
  params = lean(dict(method='rtn', spec='w8a8'), where='.*')
  table, *layers = audit((MODULE, params), TOKENS)
  assert table == ('embed/table', 'w8a8', f'{INTEGER}, lookup of int8', RIGHT)
  assert {row[1:] for row in layers} == {('w8a8', INTEGER, RIGHT)}
  text = str(jax.make_jaxpr(lambda p: MODULE.apply({'params': p}, TOKENS)[0])(params))
  assert text.count('preferred_element_type=int32') == 7 + 1             # of a layer, and the head


def test_quantizing_a_student_does_not_change_a_teacher_of_the_same_process():
  before = audit((MODULE, PLAIN), TOKENS)
  assert forms(lean(dict(method='fake_quantize', spec='w8a8'))) != {('float32', FLOAT, FLOAT)}
  assert audit((MODULE, PLAIN), TOKENS) == before


def test_two_and_three_weights_of_one_shape_keep_their_rounding_in_bfloat16():
  """Of a SwiGLU and of q, k and v: qwix loses it under the gradient, or raises."""
  square = DecoderConfig(**{**vars(CONFIG), 'groups': 2, 'hidden': 64, 'dtype': 'bfloat16'})
  plain = jax.eval_shape(Decoder(square).init, jax.random.key(0), TOKENS)['params']
  for which, count in (('gate|up', 2), ('q|k|v', 3)):
    params = jax.eval_shape(lambda p, which=which: methods.apply(
        p, (dict(where=f'layers/.*/({which})/.*', method='fake_quantize', spec='w4a16'),)), plain)
    rows = [r for r in audit((Decoder(square), params), TOKENS) if 'Fake' in r.asked]
    both = 'bfloat16 x rounded bfloat16'
    assert [(r.forward, r.gradient) for r in rows] == [(both, both)] * count


def test_experts_are_multiplied_as_they_were_asked():
  """Rows apart, group by group of inputs: as integers too."""
  def run(params, x):
    return params['kernel'].grouped(x * params['scale'].reshape(1, -1), jnp.asarray([3, 1]))
  experts = Dense(jax.ShapeDtypeStruct((2, 64, 8), jnp.float32), 'eio', (None,) * 3)
  for spec in ('w8a8', 'w4a8-g16', 'w4a8-g48'):
    w = jax.eval_shape(lambda w, spec=spec: rtn(w, spec), experts)
    row, = audit_function(run, dict(scale=jax.ShapeDtypeStruct((64,), jnp.float32), kernel=w), X)
    assert (row.forward, row.gradient) == (INTEGER, RIGHT)


def test_it_is_exported_and_takes_a_model(tiny_model):
  small = lean_jax.quantize(tiny_model, 'w8a8')
  rows = {r.name: r for r in lean_jax.audit(small, np.zeros((1, 4), np.int32))}
  assert rows['layers/mlp/up/kernel'].forward == INTEGER
  with pytest.raises(InputError, match='tokens, mask') as error:
    lean_jax.audit(small, dict(words=np.zeros((1, 4), np.int32)))
  assert "'words'" in str(error.value)


# Weights that say one thing and do another.

CONSTANT = np.ones((64, 8), np.float32)


@pytree
class DenseProduct(Quantized):
  """Stored in eight bits, multiplied as a float."""

  def einsum(self, eqn, x):
    return Weight.einsum(self, eqn, x)


@pytree
class Beforehand(Quantized):
  """Its value was taken out of it before."""

  def einsum(self, eqn, x):
    return x @ CONSTANT


@pytree
class Unrounded(FakeQuantized):
  """Its activations are left as they are."""

  def einsum(self, eqn, x):
    return Weight.einsum(self, eqn, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def vanishing(w, spec):
  return reference.fake_quant(w, spec)


vanishing.defvjp(lambda w, spec: (w, None), lambda spec, _, g: (g,))


@pytree
class Vanishing(FakeQuantized):
  """Rounded until somebody differentiates."""

  def rounded_matrix(self, matrix):
    return vanishing(matrix, self.spec)


@jax.custom_vjp
def closed(x, w):
  return x @ w


closed.defvjp(lambda x, w: (x @ w, None),
              lambda _, g: (g @ CONSTANT.T, jnp.zeros(CONSTANT.shape)))


@pytree
class Closed(FakeQuantized):
  """Its gradient is that of another value, which it closed over."""

  def einsum(self, eqn, x):
    return closed(x, self.unbox())


@pytree
class Nearly(FakeQuantized):
  """Its sum is in floats, and not one of few numbers: w + (q - w) is q up to a rounding."""

  def rounded_matrix(self, matrix):
    return matrix + jax.lax.stop_gradient(reference.fake_quant(matrix, self.spec) - matrix)


@pytree
class Frozen(FakeQuantized):
  """It learns nothing."""

  def rounded_matrix(self, matrix):
    return jax.lax.stop_gradient(reference.fake_quant(matrix, self.spec))


@pytree
class Poisoned(Dense):
  """A plain weight whose product somebody quantized."""
  value: jax.Array
  dims: str = static()
  axes: tuple = static()

  def einsum(self, eqn, x):
    return fake_quantize(Dense(self.value, self.dims, self.axes), 'w8a8').einsum(eqn, x)


def dense():
  return Dense(jax.ShapeDtypeStruct((64, 8), jnp.float32), 'io', ('embed', 'mlp'))


def broken(kind, method, spec):
  w = jax.eval_shape(lambda w: method(w, spec), dense())
  return kind(**{f.name: getattr(w, f.name) for f in dataclasses.fields(w)})


product = lambda w, x: w.einsum('bi,io->bo', x)
X = jax.ShapeDtypeStruct((4, 64), jnp.float32)
RUNS = {
    'plain': product,
    'jit': jax.jit(product),
    'remat': jax.checkpoint(product),
    'vmap': lambda w, x: jax.vmap(lambda row: product(w, row[None])[0])(x),
    'scan': lambda w, x: jax.lax.scan(lambda y, _: (y + product(w, x), None), jnp.zeros((4, 8)),
                                      length=3)[0],
    'scan of remat': lambda w, x: jax.lax.scan(
        lambda y, _: (y + jax.checkpoint(product)(w, x), None), jnp.zeros((4, 8)), length=3)[0],
    'cond': lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: product(w, x),
                                      lambda: jnp.zeros((4, 8))),
}
BROKEN = {
    'product': (lambda: broken(DenseProduct, rtn, 'w8a8'), 'asked w8a8, forward found float32 x'),
    'beforehand': (lambda: broken(Beforehand, rtn, 'w4a16-g64'), 'forward no product takes it in'),
    'activations': (lambda: broken(Unrounded, fake_quantize, 'w8a8'), 'forward found float32 x r'),
    'vanishing': (lambda: broken(Vanishing, fake_quantize, 'w4a16'),
                  'forward under the gradient found float32 x float32'),
    'closed': (lambda: broken(Closed, fake_quantize, 'w4a16'),
               'in the gradient no product takes it in'),
    'nearly': (lambda: broken(Nearly, fake_quantize, 'w4a16'), 'forward found float32 x float32'),
    'frozen': (lambda: broken(Frozen, fake_quantize, 'w4a16'), 'its own gradient is no function'),
    'poisoned': (lambda: Poisoned(*vars(dense()).values()), 'asked float32, forward found rounded'),
}
WHOLE = {
    'dense': lambda w: w, 'lsq': lambda w: lsq(w, 'w4a16'), 'lsq+': lambda w: lsq_plus(w, 'w2a16'),
    'pact': lambda w: pact(lsq(w, 'w8a8'), 6.), 'ema': lambda w: ema(fake_quantize(w, 'w8a8'), .9),
    'bitnet': lambda w: fake_quantize(w, 'w1.58a8'), 'w8a8': lambda w: rtn(w, 'w8a8'),
    'w4a8': lambda w: rtn(w, 'w4a8-g16'), 'act-order': lambda w: dataclasses.replace(
        rtn(w, 'w4a16-g16'), order=jnp.arange(64)[::-1]),
    'awq': lambda w: Rescaled(rtn(w, 'w4a16-g64'), jnp.ones(64)),
    'smoothquant': lambda w: Rescaled(rtn(w, 'w8a8'), jnp.ones(64)),
}


def through(run, w):
  """The rows of f(params, x) whose input depends on parameters, so that its gradient is wanted."""
  params = dict(first=dict(scale=jax.ShapeDtypeStruct((64,), jnp.float32)), up=dict(kernel=w))
  f = lambda p, x: run(p['up']['kernel'], x * p['first']['scale'].reshape(1, -1))
  return audit_function(f, params, X)


@pytest.mark.parametrize('how', RUNS)
def test_what_is_broken_is_found_under_every_transformation(how):
  for make, match in BROKEN.values():
    with pytest.raises(PrecisionError, match=match) as error:
      through(RUNS[how], make())
    assert 'up/kernel' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('how', RUNS)
def test_what_is_whole_passes_under_every_transformation(how):
  for method in WHOLE.values():
    row, = through(RUNS[how], jax.eval_shape(method, dense()))
    assert row.name.startswith('up/kernel') and row.forward and row.gradient


@pytest.mark.parametrize('text', KNOWN)
def test_each_scheme_is_computed_as_it_says(text):
  spec = parse_spec(text)
  if spec.group and spec.group > 64:
    text = text.replace(f'g{spec.group}', 'g64')
  trained = lambda w: fake_quantize(w, text)
  stored = lambda w: rtn(w, text)
  if spec.static:
    trained = lambda w: ema(fake_quantize(w, 'w8a8'), .9)
    stored = lambda w: rtn(trained(w), text)
  rounded = spec.activation_bits == 8
  for method, asked, forward in ((stored, text, INTEGER if rounded else RIGHT),
                                 (trained, f'FakeQuantized({text})', 'rounded ' * rounded + RIGHT)):
    row, = through(RUNS['scan of remat'], jax.eval_shape(method, dense()))
    assert row == ('up/kernel', asked, forward, RIGHT)


def test_four_bits_stored_as_floats_are_found():
  w = rtn(Dense(jnp.ones((64, 8)), 'io', (None, None)), 'w4a16-g64')
  loose = dataclasses.replace(w, values=w.codes().astype(jnp.float32))
  wide = dataclasses.replace(w, values=w.codes())
  for odd in (loose, wide):
    with pytest.raises(PrecisionError, match=r'stored as (float32|int8) \[64, 8\], expected uint8'):
      through(lambda w, x: x @ w.values.astype(jnp.float32), odd)


def test_a_module_that_takes_dense_values_cannot_compute_in_eight_bits():
  """A foreign one, nn.Dense say: eight bits are asked of the product, and it is a float one."""
  w = jax.eval_shape(lambda w: rtn(w, 'w8a8'), dense())
  with pytest.raises(PrecisionError, match='asked w8a8, forward found'):
    through(lambda w, x: x @ w.unbox(), w)
  assert through(lambda w, x: x @ w.unbox(), dense())[0].forward == FLOAT
