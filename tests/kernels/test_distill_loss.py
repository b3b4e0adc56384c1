"""distill_loss: every kind is its definition in float64, with its gradients, in little memory."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lean_jax.kernels.distill_loss.api import BUDGETS, Head, cross_entropy, distill_loss
from lean_jax.kernels.distill_loss.chunked import chunk
from lean_jax.training import mesh as meshes

T, D, E, V = 13, 6, 5, 37
KINDS = {'forward_kl': {}, 'reverse_kl': {}, 'jsd': dict(beta=.3), 'skew_kl': dict(alpha=.2),
         'skew_reverse_kl': dict(alpha=.2), 'total_variation': {}, 'top_k': dict(k=5)}


def operands(T=T, D=D, E=E, V=V, dtype='float32'):
  """hs, ws, ht, wt, labels, weights of a seed."""
  draw = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
  weights = jnp.asarray(draw.integers(0, 3, T), jnp.float32).at[0].set(0)
  return (normal(T, D), normal(D, V), normal(T, E), normal(E, V),
          jnp.asarray(draw.integers(0, V, T)), weights)


def definition(kind, p, q, option):
  """The divergence of probabilities [T V], as its paper writes it; `option` is the kind's."""
  kl = lambda p, q: jnp.sum(p * jnp.log(p / q), axis=-1)
  if kind == 'top_k':
    at = jnp.argsort(-p, axis=-1)[:, :option]
    chosen = lambda x: jnp.take_along_axis(x, at, axis=-1)
    whole = lambda x: jnp.concatenate([chosen(x), 1 - chosen(x).sum(-1, keepdims=True)], axis=-1)
    return kl(whole(p), whole(q))
  b = option
  return dict(forward_kl=lambda: kl(p, q), reverse_kl=lambda: kl(q, p),
              jsd=lambda: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
              skew_kl=lambda: kl(p, b * p + (1 - b) * q),
              skew_reverse_kl=lambda: kl(q, (1 - b) * p + b * q),
              total_variation=lambda: .5 * jnp.abs(p - q).sum(-1))[kind]()


def plain64(arrays, kind, option, temperature, soft_weight, cap=None):
  """The loss and its gradients for hs and ws, in float64, all logits at once."""
  with jax.enable_x64(True):
    hs, ws, ht, wt, labels, weights = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
    labels = jnp.asarray(arrays[4])

    def loss(hs, ws):
      z = hs @ ws
      z = z if cap is None else cap * jnp.tanh(z / cap)
      p, q = (jax.nn.softmax(x / temperature) for x in (ht @ wt, z))
      soft = temperature ** 2 * definition(kind, p, q, option)
      hard = -jnp.log(jax.nn.softmax(z))[jnp.arange(len(labels)), labels]
      return jnp.sum(weights * (soft_weight * soft + (1 - soft_weight) * hard)) / weights.sum()
    value, grads = jax.value_and_grad(loss, (0, 1))(hs, ws)
    return np.asarray(value), *map(np.asarray, grads)


def run(arrays, **how):
  """The loss and its gradients for hs and ws."""
  hs, ws, ht, wt, labels, weights = arrays
  loss = lambda hs, ws: distill_loss(hs, ws, ht, wt, labels=labels, weights=weights, **how)[0]
  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(hs, ws)
  return value, *grads


@pytest.mark.parametrize(('kind', 'implementation'), [
    *((kind, 'xla') for kind in KINDS), ('forward_kl', 'reference'), ('jsd', 'reference')])
def test_each_kind_and_its_gradients_are_those_of_its_definition_in_float64(kind, implementation):
  arrays, option = operands(), next(iter(KINDS[kind].values()), None)
  want = plain64(arrays, kind, option, 2., .6)
  got = run(arrays, kind=kind, temperature=2., soft_weight=.6, chunk=4,
            implementation=implementation, **KINDS[kind])
  # Sums of products of order 10 in float32: some dozens of roundings of 6e-8.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  for ours, theirs in zip(got[1:], want[1:]):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize('kind', ['jsd', 'top_k'])
def test_float64_operands_are_computed_in_float64(kind):
  with jax.enable_x64(True):
    arrays = operands(dtype='float64')
    got = run(arrays, kind=kind, temperature=2., soft_weight=.6, chunk=4, **KINDS[kind])
  want = plain64(arrays, kind, *KINDS[kind].values(), 2., .6)
  for ours, theirs in zip(got, want):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('size', [1, 4, 13, 50, None])
def test_no_size_of_a_chunk_changes_the_loss(size):
  arrays = operands()
  want = run(arrays, implementation='reference')
  for ours, theirs in zip(run(arrays, chunk=size), want):
    np.testing.assert_allclose(ours, theirs, atol=2e-6)        # sums of 13 terms in another order


def test_tables_scales_and_softcaps_are_the_logits_they_say():
  hs, ws, ht, wt, labels, weights = operands()
  want = plain64((hs, 3 * ws, ht, .5 * wt, labels, weights), 'forward_kl', None, 1., .5, cap=4.)
  value, dhs, dws = run((hs, ws.T, ht, wt.T, labels, weights), soft_weight=.5, chunk=4,
                        student=Head(table=True, scale=3., softcap=4.),
                        teacher=Head(table=True, scale=.5))
  np.testing.assert_allclose(value, want[0], rtol=1e-5)
  np.testing.assert_allclose(dhs, want[1], atol=1e-5)
  np.testing.assert_allclose(dws, 3 * want[2].T, atol=3e-5)


def test_without_a_teacher_it_is_the_cross_entropy():
  hs, ws, *_, labels, weights = operands()
  def plain(hs, ws):
    nll = -jax.nn.log_softmax(hs @ ws)[jnp.arange(T), labels]
    return jnp.sum(nll * weights) / jnp.sum(weights)
  ours = functools.partial(cross_entropy, labels=labels, weights=weights, chunk=4)
  for a, b in zip(jax.tree.leaves(jax.value_and_grad(ours, (0, 1))(hs, ws)),
                  jax.tree.leaves(jax.value_and_grad(plain, (0, 1))(hs, ws))):
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_the_parts_are_the_two_losses_and_have_no_gradient():
  hs, ws, ht, wt, labels, weights = operands()
  of = functools.partial(distill_loss, ht=ht, wt=wt, labels=labels, weights=weights, temperature=3.)
  loss, parts = of(hs, ws, soft_weight=.25)
  np.testing.assert_allclose(loss, .25 * parts['soft'] + .75 * parts['hard'], rtol=1e-6)
  np.testing.assert_allclose(parts['soft'], of(hs, ws, soft_weight=1.)[0], rtol=1e-6)
  np.testing.assert_allclose(parts['hard'], cross_entropy(hs, ws, labels, weights=weights),
                             rtol=1e-6)
  assert not jax.grad(lambda hs: of(hs, ws)[1]['soft'])(hs).any()


def test_temperature_and_weight_may_be_arrays_of_one_program():
  hs, ws, ht, wt, labels, weights = operands()
  count = []

  @jax.jit
  def scheduled(hs, ws, temperature, soft_weight):
    count.append(1)
    return jax.value_and_grad(lambda hs, ws: distill_loss(
        hs, ws, ht, wt, labels=labels, weights=weights, temperature=temperature,
        soft_weight=soft_weight, chunk=4)[0], (0, 1))(hs, ws)
  for temperature, soft_weight in ((2., .3), (5., 1.)):
    want = run((hs, ws, ht, wt, labels, weights), temperature=temperature, soft_weight=soft_weight,
               chunk=4)
    got = jax.tree.leaves(scheduled(hs, ws, temperature, soft_weight))
    for ours, theirs in zip(got, want):
      np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
  assert len(count) == 1
  slope = jax.grad(lambda t: distill_loss(hs, ws, ht, wt, temperature=t)[0])(2.)
  assert float(slope) == 0                                             # a setting, not a parameter


def test_nothing_flows_to_the_teacher_or_the_weights():
  hs, ws, ht, wt, _, weights = operands()
  loss = lambda ht, wt, weights: distill_loss(hs, ws, ht, wt, weights=weights)[0]
  assert not any(g.any() for g in jax.grad(loss, (0, 1, 2))(ht, wt, weights))


def products(f, *args):
  """How many products of matrices a function has."""
  return str(jax.make_jaxpr(f)(*args)).count('dot_general')


def test_gradients_that_nobody_asks_for_are_not_computed():
  hs, ws, ht, wt, *_ = operands()
  loss = lambda hs, ws: distill_loss(hs, ws, ht, wt, chunk=4)[0]
  assert products(loss, hs, ws) == 2                                       # one for each head
  assert products(jax.grad(loss), hs, ws) == 3
  assert products(jax.grad(jax.jit(loss), 1), hs, ws) == 3
  assert products(jax.grad(loss, (0, 1)), hs, ws) == 4
  frozen = lambda hs: loss(hs, jax.lax.stop_gradient(ws))
  assert products(jax.grad(frozen), hs) == 3


def test_bfloat16_operands_have_sums_in_float32():
  arrays = operands(dtype='bfloat16')
  want = plain64(arrays, 'forward_kl', None, 1., .5)
  got = run(arrays, soft_weight=.5, chunk=4)
  assert got[0].dtype == jnp.float32 and got[1].dtype == got[2].dtype == jnp.bfloat16
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)                  # the loss is not rounded
  for ours, theirs in zip(got[1:], want[1:]):      # dz is, once, and so is its product of 37 terms
    np.testing.assert_allclose(np.asarray(ours, 'f4'), theirs, atol=2 ** -7 * np.abs(theirs).max())


def test_tokens_without_weight_do_not_count_and_none_with_weight_is_no_loss():
  hs, ws, ht, wt, labels, _ = operands()
  weights = jnp.zeros(T).at[:5].set(1)
  first = tuple(x[:5] for x in (hs, ht, labels))
  some = run((hs, ws, ht, wt, labels.at[5:].set(-100), weights), soft_weight=.5, chunk=4)
  want = run((first[0], ws, first[1], wt, first[2], jnp.ones(5)), soft_weight=.5)
  np.testing.assert_allclose(some[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(some[1][:5], want[1], atol=1e-6)
  assert not some[1][5:].any()
  none = run((hs, ws, ht, wt, labels, jnp.zeros(T)), soft_weight=.5)
  assert float(none[0]) == 0 and not none[1].any() and not none[2].any()


@pytest.mark.parametrize('kind', ['forward_kl', 'total_variation', 'top_k'])
def test_a_nan_reaches_the_loss_and_the_gradients(kind):
  hs, *rest = operands()
  value, dhs, dws = run((hs.at[7, 2].set(jnp.nan), *rest), kind=kind, chunk=4, **KINDS[kind])
  assert jnp.isnan(value) and jnp.isnan(dws).any()
  assert jnp.isnan(dhs[7]).all() and not jnp.isnan(dhs[:7]).any()


@pytest.mark.parametrize('kind', KINDS)
def test_a_student_that_is_its_teacher_has_no_loss_however_sure_both_are(kind):
  hs, ws, *_ = operands()
  value, grads = jax.value_and_grad(lambda h: distill_loss(
      h, ws, 40 * hs, ws, kind=kind, **KINDS[kind])[0])(40 * hs)
  assert abs(float(value)) < 1e-5 and bool(jnp.isfinite(grads).all())


@pytest.mark.parametrize('axes', [(), ('data', 'fsdp')])
@pytest.mark.parametrize('heads', [PartitionSpec(), PartitionSpec('fsdp', 'tensor')])
def test_sharded_is_unsharded(heads, axes):
  arrays = operands(T=48, D=8, E=8, V=40)
  want = run(arrays, soft_weight=.5, kind='reverse_kl', implementation='reference')
  mesh = meshes.make_mesh(2, 2, 2)
  rows = PartitionSpec(('data', 'fsdp'))
  placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(
      arrays, (rows, heads, rows, heads, rows, rows))]
  with jax.set_mesh(mesh):
    got = run(placed, soft_weight=.5, kind='reverse_kl', chunk=4, axes=axes)
  for ours, theirs in zip(got, want):
    np.testing.assert_allclose(ours, theirs, atol=5e-6)      # sums of 48 terms in another order


def reduces_in_loop(axes):
  """Whether a mesh's devices wait for each other in every chunk."""
  arrays = operands(T=64, D=8, E=8, V=40)[:4]
  mesh = meshes.make_mesh(4, 2)
  rows, whole = PartitionSpec(('data', 'fsdp')), PartitionSpec()
  placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(
      arrays, (rows, whole, rows, whole))]
  loss = lambda *a: distill_loss(*a, chunk=16, axes=axes)[0]
  with jax.set_mesh(mesh):
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*placed).compile().as_text()
  assert 'all-reduce' in text
  bodies = [part for part in text.split('\n}') if ' dot(' in part and 'ENTRY' not in part]
  assert bodies
  return any('all-reduce' in body for body in bodies)


def test_a_mesh_sums_the_heads_gradient_once():
  assert reduces_in_loop(())
  assert not reduces_in_loop(('data', 'fsdp'))


def test_tokens_that_a_mesh_does_not_divide_are_the_same_loss():
  arrays = operands()
  want = run(arrays, implementation='reference')
  with jax.set_mesh(meshes.make_mesh(4, 2)):
    got = run(arrays, chunk=2, axes=('data', 'fsdp'))
  for ours, theirs in zip(got, want):
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def temporaries(T, V, **how):
  """Bytes of temporaries of the loss and its gradients, D = E = 256."""
  of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  loss = lambda hs, ws, ht, wt: distill_loss(hs, ws, ht, wt, **how)[0]
  done = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
      of(T, 256), of(256, V), of(T, 256), of(256, V)).compile()
  return done.memory_analysis().temp_size_in_bytes


def test_temporaries_are_an_eighth_of_the_plain_forms():
  assert temporaries(512, 32768) <= temporaries(512, 32768, implementation='reference') / 8


def test_a_chunk_is_as_many_tokens_as_its_logits_may_take_and_none_is_much_shorter():
  assert chunk(512, 32768, BUDGETS['cpu']) == 48
  assert chunk(2048, 128 * 1024, BUDGETS['rest']) == 256
  assert chunk(2048, 128 * 1024, BUDGETS['cpu']) == 48
  assert chunk(100, 64, BUDGETS['cpu']) == 100
  for T in (1, 17, 513, 4097):
    C = chunk(T, 32768, BUDGETS['cpu'])
    n = -(-T // C)
    assert C <= 56 and n * C - T < 8 * n


REFUSED = [
    (dict(kind='kl'), 'forward_kl, reverse_kl'), (dict(beta=.5), 'no options'),
    (dict(kind='jsd', k=3), 'beta'), (dict(kind='jsd', beta=1.), 'beta 1.0'),
    (dict(kind='top_k'), 'k None'), (dict(kind='top_k', k=V), f'1 to {V - 1}'),
    (dict(temperature=0.), 'temperature'), (dict(soft_weight=.5), 'without labels'),
    (dict(soft_weight=jnp.ones(())), 'without labels'),
    (dict(soft_weight=2., labels=jnp.zeros(T, int)), 'soft_weight 2.0'),
    (dict(labels=jnp.zeros(T)), 'integers'), (dict(weights=jnp.ones(T + 1)), 'weights'),
    (dict(chunk=0), 'chunk 0'), (dict(axes=('data',)), 'not of the mesh'),
    (dict(student=Head(softcap=0.)), 'softcap'), (dict(student=Head(table=True)), r'\[V D\]'),
    (dict(implementation='pallas'), 'xla, reference'), (dict(wt=jnp.ones((E, V + 1))), str(V + 1)),
    (dict(ht=jnp.ones((T + 1, E))), 'the same tokens'), (dict(ws=jnp.ones((D + 1, V))), r'\[D V\]'),
    (dict(hs=jnp.ones((T, D), int)), 'floats')]


@pytest.mark.parametrize(('change', 'says'), REFUSED, ids=[says for _, says in REFUSED])
def test_what_does_not_fit_is_refused(change, says):
  given = dict(zip(('hs', 'ws', 'ht', 'wt'), operands())) | change
  with pytest.raises(ValueError, match=says):
    distill_loss(**given)
