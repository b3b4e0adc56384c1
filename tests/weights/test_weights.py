"""Every kind of weight, in every nesting: `einsum` is the product with `unbox`."""
import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from lean_jax import tree
from lean_jax.adapters.dora import dora
from lean_jax.adapters.ia3 import ia3
from lean_jax.adapters.lora import lora
from lean_jax.adapters.merge import merge
from lean_jax.adapters.several import together, use
from lean_jax.adapters.vera import vera
from lean_jax.errors import InputError
from lean_jax.kernels.native import library
from lean_jax.kernels.quantize_rows.reference import quantize_rows
from lean_jax.nn.linear import dims_of
from lean_jax.quantization.ema import ema
from lean_jax.quantization.llm_int8 import apart
from lean_jax.quantization.lsq import lsq, lsq_plus
from lean_jax.quantization.pact import pact
from lean_jax.quantization.qat import fake_quantize
from lean_jax.quantization.rtn import rtn
from lean_jax.weights import Dense, Rescaled
from lean_jax.weights.base import pytree, to_matrix
from lean_jax.weights.description import abstract, describe, difference
from lean_jax.weights.prepared import Prepared, prepare, refuse_prepared

part = functools.partial


def adapted(w, **kw):
  """LoRA away from its start, where b is zero."""
  return moved(lora(w, 2, 4., key=jax.random.key(1)))


def moved(w):
  """The weight with what it has of floats a little larger."""
  return jax.tree.map(lambda x: x + .1 if jnp.issubdtype(x.dtype, jnp.floating) else x, w)


def switched(base, one, other):
  """Two adapters over a base, the second in use."""
  other = dataclasses.replace(other, base=base)
  one = dataclasses.replace(one, base=base)
  return use(together(dict(one={'w': one}, other={'w': other})), 'other')['w']


def rising(w):
  """The weight scaled by a number of its own each."""
  return dataclasses.replace(w, by=jnp.linspace(.5, 2., w.by.size).reshape(w.by.shape))


def reordered(w):
  """The weight whose rows are stored in another order, each matrix's own."""
  *batch, I, _ = w.matrix(jnp.float32).shape
  order = jax.vmap(lambda key: jax.random.permutation(key, I))(
      jax.random.split(jax.random.key(2), math.prod(batch)))
  return dataclasses.replace(w, order=order.reshape(*batch, I))


def averaged(w):
  """The weight whose activations' range has been seen."""
  w = ema(fake_quantize(w, 'w8a8'), .9)
  return dataclasses.replace(w, inputs=dataclasses.replace(w.inputs, range=w.inputs.range + 1.5))


def clipping(w):
  """The weight that clips a part of its activations."""
  return pact(fake_quantize(w, 'w8a8'), 1.5)


def rescaled(w):
  """The weight with each input times a number of its own."""
  shape = w.matrix(jnp.float32).shape[:-1]
  return Rescaled(w, jax.random.uniform(jax.random.key(3), shape, minval=.5, maxval=2.))


def outlying(w, spec='w8a16'):
  """The weight with the rows of some inputs apart, more of one layer or expert than of another."""
  shape = jax.eval_shape(lambda: to_matrix(w.value, w.dims)).shape[:-1]
  return apart(w, np.random.default_rng(0).random(shape) < .3, spec)


KINDS = {
    'dense': lambda w: w,
    'w8a16': part(rtn, spec='w8a16'),
    'w4a16': part(rtn, spec='w4a16'),
    'w4a16-g4': part(rtn, spec='w4a16-g4'),
    'w4a16-g4-asym': part(rtn, spec='w4a16-g4-asym'),
    'w2a16-g3': part(rtn, spec='w2a16-g3'),
    'w3a16-g8': part(rtn, spec='w3a16-g8'),
    'w5a16-tensor': part(rtn, spec='w5a16-tensor'),
    'nf4-g8-dq': part(rtn, spec='nf4-g8-dq'),
    'fp8': part(rtn, spec='fp8'),
    'w1.58a16': part(rtn, spec='w1.58a16'),
    'act-order': lambda w: reordered(rtn(w, 'w4a16-g4-asym')),
    'int4': lambda w: prepare(rtn(w, 'w4a16-g4'), 'tpu'),
    'int4-asym': lambda w: prepare(rtn(w, 'w4a16-g4-asym'), 'tpu'),
    'int2': lambda w: prepare(rtn(w, 'w2a16-g3'), 'tpu'),
    'int2-ternary': lambda w: prepare(rtn(w, 'w1.58a16'), 'tpu'),
    'int4-act-order': lambda w: prepare(reordered(rtn(w, 'w4a16-g4-asym')), 'tpu'),
    'columns': lambda w: prepare(rtn(w, 'w3a16-g8'), 'gpu'),
    'columns-nf4': lambda w: prepare(rtn(w, 'nf4-g8-dq'), 'gpu'),
    'qat': part(fake_quantize, spec='w4a16-g4'),
    'lsq': part(lsq, spec='w4a16-g4'),
    'lsq_plus': part(lsq_plus, spec='w2a16-g3'),
    'rescaled': lambda w: rescaled(rtn(w, 'w4a16-g4')),
    'outliers': outlying,
    'lora': adapted,
    'qlora': lambda w: adapted(rtn(w, 'w4a16-g4')),
    'qlora-int4': lambda w: prepare(adapted(rtn(w, 'w4a16-g4')), 'tpu'),
    'dora': lambda w: moved(dora(w, 2, 4., key=jax.random.key(1))),
    'qdora': lambda w: moved(dora(rtn(w, 'w4a16-g4'), 2, 4., key=jax.random.key(1))),
    'vera': lambda w: moved(vera(w, 2, 24)),
    'qvera': lambda w: moved(vera(rtn(w, 'w4a16-g4'), 2, 24)),
    'ia3-outputs': lambda w: rising(ia3(w, 'outputs')),
    'ia3-inputs': lambda w: rising(ia3(rtn(w, 'w4a16-g4'), 'inputs')),
    'several': lambda w: switched(w, adapted(w), moved(lora(w, 1, 3., key=jax.random.key(2)))),
    'lora_over_qat': lambda w: adapted(fake_quantize(w, 'w2a16-g4')),
}
ROUNDS_ACTIVATIONS = {'w8a8': part(rtn, spec='w8a8'), 'qat8': part(fake_quantize, spec='w8a8'),
                      'w8a8-columns': lambda w: prepare(rtn(w, 'w8a8'), 'gpu'),
                      'w4a8-int4': lambda w: prepare(rtn(w, 'w4a8-g4'), 'tpu'),
                      'w4a8-g4': part(rtn, spec='w4a8-g4'), 'w1.58a8': part(rtn, spec='w1.58a8'),
                      'lsq8': part(lsq, spec='w8a8'), 'bitnet': part(fake_quantize, spec='w1.58a8'),
                      'pact': clipping, 'ema': averaged,
                      'w8a8-static': lambda w: rtn(clipping(w), 'w8a8-static')}
EQNS = {
    'btd,df->btf': ((2, 3, 8), (8, 6)),
    'btd,dhk->bthk': ((2, 3, 8), (8, 2, 4)),
    'bthk,hkd->btd': ((2, 3, 2, 5), (2, 5, 6)),
    'ebtd,edf->ebtf': ((3, 2, 3, 8), (3, 8, 6)),
    'btd,vd->btv': ((2, 3, 8), (10, 8)),
}


# Of kinds that differ in their arrays one each: for what takes a program of its own to try.
MAIN = ('dense', 'w4a16-g4-asym', 'nf4-g8-dq', 'act-order', 'lsq', 'rescaled', 'outliers', 'lora',
        'dora', 'ia3-inputs', 'int4', 'w8a8', 'w4a8-g4', 'w8a8-static')


def cases(kinds, eqns, mine=lambda kind, eqn: kind in MAIN):
  """Kinds and equations, those that are not `mine` on demand."""
  return [pytest.param(kind, eqn, marks=[] if mine(kind, eqn) else [pytest.mark.slow])
          for kind in kinds for eqn in eqns]


def thin(kind, eqn):
  """Each kind with two equations, one with all of them."""
  return kind in ('w4a16-g4', 'w8a8') or eqn in ('bthk,hkd->btd', 'ebtd,edf->ebtf')


def weight(eqn, shape):
  value = jax.random.normal(jax.random.key(1), shape)
  return Dense(value, dims_of(eqn), tuple('abc'[:len(shape)]))


@pytest.mark.parametrize(('kind', 'eqn'), cases(KINDS, EQNS, thin))
def test_einsum_is_the_product_with_unbox(kind, eqn):
  xs, ws = EQNS[eqn]
  x = jax.random.normal(jax.random.key(0), xs)
  w = KINDS[kind](weight(eqn, ws))
  assert w.unbox().shape == w.shape == ws
  # float32 sums of at most 10 terms of order 1
  np.testing.assert_allclose(w.einsum(eqn, x), jnp.einsum(eqn, x, w.unbox()), atol=2e-5)


@pytest.mark.parametrize(('kind', 'eqn'), cases(ROUNDS_ACTIVATIONS, EQNS, thin))
def test_einsum_is_the_product_of_rounded_activations_with_unbox(kind, eqn):
  xs, ws = EQNS[eqn]
  x = jax.random.normal(jax.random.key(0), xs)
  w = ROUNDS_ACTIVATIONS[kind](weight(eqn, ws))
  inputs = sum(d == 'i' for d in w.dims)
  rows = x.reshape(*x.shape[:x.ndim - inputs], -1)     # the contraction is last in these equations
  step = getattr(w, 'rest', w).input_scale
  if step is not None:                                 # one step for each matrix
    rows = rows.reshape(*step.shape, -1, rows.shape[-1])
  codes, scale = quantize_rows(rows, step)
  rounded = (codes * scale).reshape(x.shape)
  np.testing.assert_allclose(w.einsum(eqn, x), jnp.einsum(eqn, rounded, w.unbox()), atol=2e-5)


@pytest.mark.parametrize(('kind', 'eqn'), cases(
    KINDS | ROUNDS_ACTIVATIONS, ['etd,edf->etf', 'etdg,dfeg->etf'],
    lambda kind, eqn: kind == 'w4a8-g4' or (kind in MAIN and eqn == 'etd,edf->etf')))
def test_grouped_is_einsum_of_each_expert(kind, eqn):
  xs, rest = eqn.split(',')
  ws = rest.split('->')[0]
  size = dict(e=4, t=5, d=8, g=3, f=6)
  w = (KINDS | ROUNDS_ACTIVATIONS)[kind](weight(eqn, tuple(size[c] for c in ws)))
  x = jax.random.normal(jax.random.key(0), tuple(size[c] for c in xs))
  rows = np.array([5, 0, 2, 4])                       # of each expert's five
  apart = lambda y: jnp.concatenate([part[:n] for part, n in zip(y.reshape(4, 5, -1), rows)])
  # up to 24 terms of order 1, in another order; the gradients of bfloat16 scales are rounded once
  near = lambda a, b: np.testing.assert_allclose(
      *(np.asarray(x, np.float32) for x in (a, b)), atol=2e-5,
      rtol=1e-2 if a.dtype == jnp.bfloat16 else 1e-4)
  near(w.grouped(apart(x), jnp.asarray(rows)), apart(w.einsum(eqn, x)))
  dy = apart(jax.random.normal(jax.random.key(1), (4, 5, 6)))
  of = lambda run: tree.named_arrays(jax.jit(jax.grad(
      lambda x, w: jnp.sum(dy * run(x, w)), (0, 1), allow_int=True))(x, w))
  got = of(lambda x, w: w.grouped(apart(x), jnp.asarray(rows)))
  want = of(lambda x, w: apart(w.einsum(eqn, x)))
  for name, a in got.items():
    # einsum sees the rows that are not there too, and they are in what a moving average follows
    if jnp.issubdtype(a.dtype, jnp.floating) and not name.endswith('/inputs/range'):
      near(a, want[name])


@pytest.mark.parametrize('kind', KINDS | ROUNDS_ACTIVATIONS)
def test_names_has_one_name_for_each_axis_of_each_array(kind):
  for eqn, (_, ws) in EQNS.items():
    w = (KINDS | ROUNDS_ACTIVATIONS)[kind](weight(eqn, ws))
    names = jax.tree.leaves(w.names(), is_leaf=lambda t: isinstance(t, tuple))
    assert [len(n) for n in names] == [a.ndim for a in jax.tree.leaves(w)]


@pytest.mark.parametrize('kind', KINDS | ROUNDS_ACTIVATIONS)
def test_a_description_rebuilds_the_very_tree(kind):
  w = {'a': {'kernel': (KINDS | ROUNDS_ACTIVATIONS)[kind](weight('btd,df->btf', (8, 6)))}}
  found = json.loads(json.dumps(describe(w)))
  assert jax.tree.structure(abstract(found)) == jax.tree.structure(w)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract(found), w)
  assert jax.tree.all(same)
  assert difference(found, describe(w)) is None


def test_a_description_says_where_it_differs():
  w = weight('btd,df->btf', (8, 6))
  found = difference(describe({'up': rtn(w, 'w4a16')}), describe({'up': rtn(w, 'w8a16')}))
  assert found.startswith('up/')
  with pytest.raises(InputError, match='Sparse'):
    abstract({'kind': 'Sparse'})


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    from lean_jax.nn.linear import Linear
    return x + Linear('btd,df->btf', (8, 8), ('embed', 'mlp'), name='up')(x), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    scan = nn.scan(nn.remat(Block, prevent_cse=False), variable_axes={'params': 0},
                   split_rngs={'params': True}, length=3,
                   metadata_params={nn.PARTITION_NAME: 'layers'})
    return scan(name='layers')(x, None)[0]


@pytest.mark.parametrize('kind', [
    pytest.param(kind, marks=[] if kind in MAIN else [pytest.mark.slow])
    for kind in KINDS | ROUNDS_ACTIVATIONS])
def test_scan_remat_jit_grad_and_vmap_compute_what_the_layers_do(kind):
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  params = Stack().init(jax.random.key(1), x)['params']
  params = tree.transform(params, [('.*', (KINDS | ROUNDS_ACTIVATIONS)[kind])])
  w = params['layers']['up']['kernel']
  assert w.dims == 'nio' and w.axes == ('layers', 'embed', 'mlp')
  want = x
  for k in range(3):
    layer = jax.tree.map(lambda a, k=k: a[k], w).remove_axis(0, {})
    want = want + layer.einsum('btd,df->btf', want)
  run = lambda x: Stack().apply({'params': params}, x)
  np.testing.assert_allclose(jax.jit(run)(x), want, atol=1e-4)
  np.testing.assert_allclose(jax.vmap(run)(x[None])[0], want, atol=1e-4)
  grad = jax.grad(lambda x: run(x).sum())(x)
  assert bool(jnp.all(jnp.isfinite(grad))) and float(jnp.abs(grad).max()) > 0


class Foreign(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.relu(nn.Dense(16)(x)))


def test_a_module_that_knows_nothing_of_weights_gets_dense_values():
  x = jax.random.normal(jax.random.key(0), (4, 8))
  plain = Foreign().init(jax.random.key(1), x)['params']
  boxed = jax.tree.map(lambda a: Dense(a, 'io', ('in', 'out')) if a.ndim == 2 else a, plain)
  lean = tree.transform(boxed, [('.*', KINDS['qlora'])])
  dense = jax.tree.map(meta.unbox, lean, is_leaf=tree.is_weight)
  np.testing.assert_allclose(Foreign().apply({'params': lean}, x),
                             Foreign().apply({'params': dense}, x), atol=1e-5)


def test_merging_an_adapter_changes_nothing():
  w = KINDS['qlora'](weight('btd,df->btf', (8, 6)))
  assert isinstance(merge(w), Dense)
  np.testing.assert_array_equal(merge(w).unbox(), w.unbox())


def test_an_adapter_changes_nothing_at_its_start():
  w = weight('btd,df->btf', (8, 6))
  np.testing.assert_array_equal(lora(w, 2, 4., key=jax.random.key(0)).unbox(), w.unbox())


@pytest.mark.parametrize('rank', [0, -1, 7])
def test_a_rank_out_of_range_is_refused(rank):
  with pytest.raises(InputError, match='rank'):
    lora(weight('btd,df->btf', (8, 6)), rank, 1., key=jax.random.key(0))


@pytest.mark.parametrize('scheme', ['w8a16', 'w4a16-g4', 'w4a16-g4-asym', 'w2a16-g4', 'w3a16-g4',
                                    'w5a16-g4', 'w1.58a16', 'w1a16', 'nf4-g4-dq', 'w8a8'])
@pytest.mark.parametrize('platform', ['tpu', 'gpu', 'cpu'])
def test_preparing_changes_no_value_and_can_be_undone(scheme, platform):
  w = rtn(weight('btd,vd->btv', (10, 12)), scheme)
  p = prepare({'a': {'kernel': w}}, platform)['a']['kernel']
  apart = platform == 'cpu' or (platform == 'tpu' and scheme == 'nf4-g4-dq')
  assert isinstance(p, Prepared) is not apart
  np.testing.assert_array_equal(p.unbox(), w.unbox())
  np.testing.assert_array_equal(p.take(jnp.asarray([[3, 1], [0, 3]])),
                                w.take(jnp.asarray([[3, 1], [0, 3]])))
  if not apart:
    np.testing.assert_array_equal(p.quantized().values, w.values)
    assert prepare(p, platform) is p


@pytest.mark.skipif(not library.takes_panels(), reason='no kernel here reads panels')
@pytest.mark.parametrize(('scheme', 'eqn'), [
    ('w4a16-g8', 'btd,dhk->bthk'), ('nf4-g8-dq', 'btd,vd->btv'), ('w8a8', 'ebtd,edf->ebtf'), *(
        pytest.param(*pair, marks=pytest.mark.slow) for pair in (
            ('w8a16', 'btd,vd->btv'), ('w4a16-g8-asym', 'btd,vd->btv'), ('mxfp4', 'btd,df->btf'),
            ('w2a16-g16', 'ebtd,edf->ebtf'), ('w4a8-g8', 'btd,df->btf')))])
def test_panels_of_a_cpu_hold_the_same_weight(scheme, eqn):
  sizes = dict(b=2, t=3, d=32 if scheme == 'mxfp4' else 20, f=128, v=64, h=4, k=32, e=3)
  shape = lambda names: tuple(sizes[n] for n in names)
  x_names, w_names = eqn.split('->')[0].split(',')
  w = rtn(weight(eqn, shape(w_names)), scheme)
  p = prepare(w, 'cpu')
  assert isinstance(p, Prepared) and p.layout == 'panels'
  assert prepare(p, 'cpu') is p
  np.testing.assert_array_equal(p.unbox(), w.unbox())
  np.testing.assert_array_equal(p.quantized().values, w.values)
  x = jax.random.normal(jax.random.key(1), shape(x_names))
  got, want = p.einsum(eqn, x), w.einsum(eqn, x)
  # up to 32 products of float32 in another order
  np.testing.assert_allclose(got, want, atol=2. ** -23 * 32 * float(jnp.abs(want).max()), rtol=0)
  grads = [jax.grad(lambda x, w=w: jnp.sum(jnp.sin(w.einsum(eqn, x))))(x) for w in (p, w)]
  np.testing.assert_allclose(*grads, atol=1e-4, rtol=1e-4)
  if eqn == 'btd,vd->btv':
    ids = jnp.asarray([[3, 1], [63, 3]])
    np.testing.assert_array_equal(p.take(ids), w.take(ids))


def test_what_has_no_panels_stays_packed():
  for scheme, shape in (('w4a16', (8, 60)), ('fp8', (8, 64)), ('w3a16', (8, 64)),
                        ('w4a16-g4', (8, 64))):
    w = rtn(weight('btd,df->btf', shape), scheme)
    assert prepare(w, 'cpu') is w
  with pytest.raises(ValueError, match='multiples of 64 columns, and there are 60'):
    Prepared.of(rtn(weight('btd,df->btf', (8, 60)), 'w4a16'), 'panels')
  with pytest.raises(ValueError, match="'panels' of w3a16; it takes codes of 2, 4 and 8 bits"):
    Prepared.of(rtn(weight('btd,df->btf', (8, 64)), 'w3a16'), 'panels')


def test_a_prepared_tree_is_not_saved():
  params = prepare({'up': {'kernel': KINDS['qlora'](weight('btd,df->btf', (8, 6)))}}, 'tpu')
  with pytest.raises(InputError, match='up/kernel/base is laid out .* save the tree'):
    refuse_prepared(params)
  with pytest.raises(InputError, match='there are: cpu, tpu, gpu'):
    prepare(params, 'npu')


def test_trees_of_different_kinds_are_different():
  """Else a cache of programs may give one the program of another."""
  class A(Dense):
    pass

  class B(Dense):
    pass
  a, b = (pytree(kind)(jnp.ones((3, 2)), 'io', (None, None)) for kind in (A, B))
  assert jax.tree.structure(a) == jax.tree.structure(jax.tree.map(lambda x: x + 1, a))
  assert jax.tree.structure(a) != jax.tree.structure(b)
