"""Mixture of experts: each token gets the weighed sum of its own experts, and nothing else."""
import dataclasses
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from lean_jax import tree
from lean_jax.models.config import Layer, StackConfig
from lean_jax.models.frame import Frame
from lean_jax.nn import moe, router
from lean_jax.nn.moe import MoE, MoEOptions
from lean_jax.nn.router import RouterOptions
from lean_jax.quantization.rtn import rtn
from lean_jax.training import mesh as meshes

D, F, E = 8, 6, 8
B, T = 3, 5


class Case(NamedTuple):
  router: RouterOptions
  more: dict = {}


CASES = {
    'mixtral': Case(RouterOptions(top_k=2)),
    'qwen3_moe': Case(RouterOptions(top_k=3, normalise=False)),
    'deepseek_v3': Case(
        RouterOptions(top_k=3, scores='sigmoid', scale=2.5, correction=True, groups=4,
                      top_groups=2),
        dict(shared_hidden=5)),
    'gpt_oss': Case(RouterOptions(top_k=2, scores='logits', bias=True),
                    dict(bias=True, limit=.5)),
}


def config(case, **kw):
  o = MoEOptions(experts=E, hidden=F, router=case.router, **case.more | kw)
  return StackConfig(vocabulary=9, width=D, layers=1, context=T, moe=o,
                     kinds=(Layer(feed_forward='moe'),))


def model(case, **kw):
  """The module, its parameters, all of them random, and an input."""
  module = MoE(config(case, **kw))
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  params = jax.jit(module.init)(jax.random.key(1), x, Frame())['params']
  rng = np.random.default_rng(0)
  noisy = lambda a: a + jnp.asarray(.3 * rng.normal(size=a.shape), jnp.float32)
  return module, jax.tree.map(noisy, params), x


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def by_hand(case, params, row):
  """What one token [D] gets, in float64: {expert: its weight} and the output."""
  o, more = case.router, case.more
  p = jax.tree.map(lambda w: np.asarray(meta.unbox(w), np.float64), params,
                   is_leaf=lambda w: isinstance(w, meta.AxisMetadata))
  logits = row @ p['router']['kernel'] + p['router'].get('bias', 0)
  scores = dict(softmax=softmax, sigmoid=sigmoid, logits=lambda x: x)[o.scores](logits)
  wanted = scores + p['router'].get('correction', 0)
  allowed = range(E)
  if o.groups > 1:
    members = np.split(np.arange(E), o.groups)
    sums = [sorted(wanted[m])[-1] + sorted(wanted[m])[-2] for m in members]
    best = sorted(range(o.groups), key=lambda g: -sums[g])[:o.top_groups]
    allowed = [e for g in best for e in members[g]]
  chosen = sorted(allowed, key=lambda e: -wanted[e])[:o.top_k]
  share = scores[chosen]
  if o.scores == 'logits':
    share = softmax(share)
  elif o.normalise:
    share = share / share.sum()
  share = share * o.scale

  def mlp(p, e=None):
    of = lambda name, x: x @ (p[name]['kernel'] if e is None else p[name]['kernel'][e]) + (
        p[name]['bias'][e] if 'bias' in p[name] else 0)
    gate, up = of('gate', row), of('up', row)
    if limit := more.get('limit'):
      gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
      return of('down', (up + 1) * gate * sigmoid(1.702 * gate))
    return of('down', gate * sigmoid(gate) * up)
  y = sum(s * mlp(p['experts'], e) for s, e in zip(share, chosen))
  return dict(zip(chosen, share)), y + (mlp(p['shared']) if 'shared' in p else 0)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_token_gets_what_its_router_says_and_no_other_expert(case):
  module, params, x = model(case)
  run = jax.jit(lambda p, x: module.apply({'params': p}, x, Frame(), mutable=['taps']))
  y, sown = run(params, x)
  experts = np.asarray(sown['taps']['chosen'][0]).reshape(B * T, -1)
  for k, row in enumerate(np.asarray(x, np.float64).reshape(B * T, D)):
    share, want = by_hand(case, params, row)
    assert experts[k].tolist() == list(share)
    np.testing.assert_allclose(y.reshape(B * T, D)[k], want, atol=2e-5)      # float32


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_room_for_all_is_dropless_and_its_gradients(case):
  module, params, x = model(case)
  other = MoE(config(case, capacity=float(E)))
  mask = jnp.arange(T)[None] < jnp.asarray([5, 3, 1])[:, None]

  def run(module, frame):
    def loss(p, x):
      y = module.apply({'params': p}, x, frame)
      return jnp.sum(jnp.where(mask[:, :, None], y, 0) ** 2), y
    (_, y), g = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    return jnp.where(mask[:, :, None], y, 0), g
  want = run(module, Frame())
  for frame in (Frame(), Frame(mask=mask)):
    for a, b in zip(jax.tree.leaves(run(other, frame)), jax.tree.leaves(want)):
      # float32 sums of as many terms as there are tokens, in another order
      np.testing.assert_allclose(a, b, rtol=0, atol=B * T * 2 ** -24 * float(jnp.abs(b).max()))
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(want))
  grads = want[1][0]
  assert all(float(jnp.abs(meta.unbox(g)).max()) > 0 for name, g in grads['router'].items()
             if name != 'correction')


def test_what_is_over_an_experts_room_is_dropped_second_choices_first():
  run = lambda x: x
  x = jnp.arange(1., 7.)[:, None]
  chosen = jnp.asarray([[0, 1], [0, 1], [0, 2], [1, 0], [2, 1], [0, 1]])
  share = jnp.full((6, 2), 1.) * jnp.asarray([[10., 1.]])
  mask = jnp.asarray([True, True, True, True, True, False])
  # Room for 6 * 2 / 3 = 4: expert 1 has its first choice 3, then 0, 1, 4; expert 0: 0, 1, 2, 3.
  y = moe.bounded(run, x, chosen, share, 3, 1., mask)
  np.testing.assert_array_equal(y[:, 0], [11, 22, 33, 44, 55, 0])
  # Room for 2: of 0's choices the first two, of 1's 3 and then 0, of 2's 4 and then 2.
  y = moe.bounded(run, x, chosen, share, 3, .5, mask)
  np.testing.assert_array_equal(y[:, 0], [11, 20, 3, 40, 50, 0])


def test_losses_are_those_of_the_papers_over_real_tokens_alone():
  o = RouterOptions(top_k=2, balance=.5, z=.25)
  module, params, x = model(Case(o))
  mask = jnp.arange(T)[None] < jnp.asarray([5, 3, 1])[:, None]
  sown = module.apply({'params': params}, x, Frame(mask=mask), mutable=['losses'])[1]['losses']
  real = np.asarray(x)[np.asarray(mask)]
  logits = real @ np.asarray(params['router']['kernel'])
  probs = np.stack([softmax(r) for r in logits])
  counts = np.zeros(E)
  for row in probs:
    counts[np.argsort(-row)[:2]] += 1
  want = .5 * E * np.sum(counts / len(real) * probs.mean(axis=0))
  np.testing.assert_allclose(sown['router']['balance'][0], want, rtol=1e-5)
  want = .25 * np.mean(np.log(np.exp(logits).sum(axis=1)) ** 2)
  np.testing.assert_allclose(sown['router']['z'][0], want, rtol=1e-5)


def test_the_balance_loss_is_that_of_transformers():
  torch = pytest.importorskip('torch')
  mixtral = pytest.importorskip('transformers.models.mixtral.modeling_mixtral')
  logits = np.random.default_rng(0).normal(size=(12, E)).astype(np.float32)
  mask = np.arange(12) % 3 > 0
  for m in (None, mask):
    want = mixtral.load_balancing_loss_func(
        (torch.tensor(logits),), E, 2, None if m is None else torch.tensor(m.astype(np.int64)))
    chosen, _ = router.choices(jnp.asarray(logits), RouterOptions(top_k=2))
    got = router.balance_loss(jnp.asarray(logits), chosen, 'softmax', m)
    np.testing.assert_allclose(got, float(want), rtol=1e-5)


def test_an_even_load_has_the_least_balance_loss():
  logits = jnp.log(jnp.eye(E) * 3 + 1)
  even = router.balance_loss(logits, jnp.arange(E)[:, None], 'softmax')
  np.testing.assert_allclose(even, 1., rtol=1e-6)
  assert router.balance_loss(logits[:1], jnp.zeros((1, 1), jnp.int32), 'softmax') > 1


@pytest.mark.parametrize('capacity', [None, 2.])
def test_padding_changes_nothing_for_other_tokens(capacity):
  module, params, x = model(CASES['mixtral'], capacity=capacity)
  mask = jnp.asarray([[True] * 5, [False, False, True, True, True], [True] * 2 + [False] * 3])
  run = jax.jit(lambda x: module.apply({'params': params}, x, Frame(mask=mask)))
  other = jnp.where(mask[:, :, None], x, 7.)
  np.testing.assert_array_equal(*(jnp.where(mask[:, :, None], run(a), 0) for a in (x, other)))


@pytest.mark.parametrize('kind', ['dense', 'w4a16', 'capacity'])
def test_on_a_mesh_each_device_has_its_rows_and_nothing_changes(kind):
  capacity = 2. if kind == 'capacity' else None
  module, params, _ = model(Case(RouterOptions(balance=.1)), capacity=capacity)
  if kind == 'w4a16':
    params = tree.transform(params, [('.*', partial(rtn, spec='w4a16-g4'))])
  x = jax.random.normal(jax.random.key(0), (4, 6, D))

  @jax.jit
  @partial(jax.grad, argnums=(0, 1), allow_int=True)
  def loss(params, x):
    y, sown = module.apply({'params': params}, x, Frame(), mutable=['losses'])
    return jnp.sum(y ** 2) + sum(jax.tree.leaves(sown))
  floats = lambda grads: [np.asarray(g, np.float32) for g in jax.tree.leaves(grads)
                          if jnp.issubdtype(g.dtype, jnp.floating)]
  want = floats(loss(params, x))
  mesh = meshes.make_mesh(2, 2, 2)
  with meshes.on(mesh):
    there = jax.device_put(params, meshes.shardings(params, mesh))
    run = loss.lower(there, meshes.put_batch(dict(x=np.asarray(x)), mesh)['x']).compile()
    got = floats(run(there, meshes.put_batch(dict(x=np.asarray(x)), mesh)['x']))
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=2e-2 * abs(b).max() if kind == 'w4a16' else 1e-4)
  # The choices of all devices, in one sort, would be 4 * 6 * 2.
  assert kind == 'capacity' or not re.search(r's32\[48\].* sort\(', run.as_text())


class Layers(nn.Module):
  config: StackConfig

  @nn.compact
  def __call__(self, x):
    class Block(nn.Module):
      config: StackConfig

      @nn.compact
      def __call__(self, x, _):
        return x + MoE(self.config, name='moe')(x, Frame()), None
    scan = nn.scan(nn.remat(Block, prevent_cse=False), length=3, split_rngs={'params': True},
                   variable_axes={'params': 0, 'losses': 0, 'taps': 0},
                   metadata_params={nn.PARTITION_NAME: 'layers'})
    return scan(self.config, name='layers')(x, None)[0]


@pytest.mark.parametrize('capacity', [None, 1.5])
def test_layers_under_scan_and_remat_compute_what_each_does(capacity):
  case = Case(RouterOptions(balance=.1, z=.1), dict(bias=True))
  c = config(case, capacity=capacity)
  x = jax.random.normal(jax.random.key(0), (B, T, D))
  params = jax.jit(Layers(c).init)(jax.random.key(1), x)['params']

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    y, sown = Layers(c).apply({'params': params}, x, mutable=['losses'])
    return jnp.sum(y ** 2) + sum(jnp.sum(v) for v in jax.tree.leaves(sown))
  got, grads = loss(params)
  want, total = x, 0.
  for k in range(3):
    layer = jax.tree.map(lambda a, k=k: a[k], params['layers']['moe'])
    layer = jax.tree.map(lambda w: w.remove_axis(0, {}) if isinstance(w, meta.AxisMetadata) else w,
                         layer, is_leaf=lambda w: isinstance(w, meta.AxisMetadata))
    y, sown = MoE(c).apply({'params': layer}, want, Frame(), mutable=['losses'])
    want, total = want + y, total + sum(jax.tree.leaves(sown))
  np.testing.assert_allclose(got, jnp.sum(want ** 2) + total, rtol=1e-5)
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))
  assert bool(jnp.all(jnp.abs(grads['layers']['moe']['router']['kernel']).max(axis=(1, 2)) > 0))


def test_bfloat16_activations_are_routed_in_float32():
  case = CASES['deepseek_v3']
  module, params, x = model(case)
  narrow = MoE(dataclasses.replace(module.config, dtype='bfloat16'))
  x = x.astype(jnp.bfloat16)
  y, sown = narrow.apply({'params': params}, x, Frame(), mutable=['taps'])
  wide, want = module.apply({'params': params}, x.astype(jnp.float32), Frame(), mutable=['taps'])
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(sown['taps']['router']['logits'][0],
                                want['taps']['router']['logits'][0])
  np.testing.assert_allclose(y.astype(jnp.float32), wide, atol=.05 * float(jnp.abs(wide).max()))
