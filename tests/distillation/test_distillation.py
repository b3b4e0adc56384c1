"""Soft labels against float64 and against PyTorch; a student's start."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import methods
from lean_jax.distillation.losses import distillation
from lean_jax.distillation.soft_labels import soft_labels
from lean_jax.distillation.start import alternating, take_layers
from lean_jax.errors import InputError
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.objectives.forward import forward, hidden, targets
from lean_jax.objectives.language_modeling import cross_entropy, next_token

SHAPE = (2, 5, 11)


def logits(seed):
  return 3 * jax.random.normal(jax.random.key(seed), SHAPE)


def log_softmax64(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('temperature', [.5, 1., 2., 10.])
def test_soft_labels_are_the_float64_divergence(temperature):
  mask = jnp.ones(SHAPE[:2]).at[0, 3:].set(0)
  log_p, log_q = (log_softmax64(np.asarray(logits(k), np.float64) / temperature) for k in (1, 0))
  kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  want = temperature ** 2 * kl[np.asarray(mask) == 1].mean()
  got = soft_labels(logits(0), logits(1), mask, temperature=temperature)
  np.testing.assert_allclose(got, want, rtol=2e-6)


def test_its_gradient_is_the_difference_of_the_distributions():
  mask = jnp.ones(SHAPE[:2])
  got = jax.grad(lambda x: soft_labels(x, logits(1), mask, temperature=2.))(logits(0))
  p, q = (np.exp(log_softmax64(np.asarray(logits(k), np.float64) / 2)) for k in (1, 0))
  np.testing.assert_allclose(got, 2 * (q - p) / mask.size, atol=1e-6)     # T^2 / T


def test_nothing_flows_to_the_teacher_and_equal_ones_have_no_loss():
  mask = jnp.ones(SHAPE[:2])
  grad = jax.grad(lambda t: soft_labels(logits(0), t, mask, temperature=2.))(logits(1))
  assert not grad.any()
  assert abs(float(soft_labels(logits(0), logits(0), mask, temperature=2.))) < 1e-6


def test_cross_entropy_counts_what_the_mask_lets():
  targets = jnp.arange(10).reshape(2, 5)
  mask = jnp.ones((2, 5)).at[1].set(0)
  want = -log_softmax64(logits(0))[0, np.arange(5), np.arange(5)].mean()
  np.testing.assert_allclose(cross_entropy(logits(0), targets, mask), want, rtol=1e-6)


def test_the_language_modeling_loss_is_optax():
  import optax
  config = DecoderConfig(vocabulary=32, width=16, layers=1, heads=2, groups=1, head_width=8,
                         hidden=16, context=8)
  module = Decoder(config)
  tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 32)
  params = jax.jit(module.init)(jax.random.key(1), tokens)['params']
  y, _ = module.apply({'params': params}, tokens)
  want = optax.softmax_cross_entropy_with_integer_labels(y[:, :-1], tokens[:, 1:]).mean()
  np.testing.assert_allclose(next_token(module)(params, dict(tokens=tokens), None)[0], want,
                             rtol=1e-6)
  mixed = distillation(module, module, temperature=3., soft_weight=.25)
  value, metrics = mixed(params, dict(tokens=tokens), None, teacher_params=params)
  np.testing.assert_allclose(metrics['hard'], want, rtol=1e-6)
  np.testing.assert_allclose(value, .75 * want, rtol=1e-5)                # soft is 0: one model


HEADS = [dict(), dict(logit_scale=.5, logit_softcap=2.)]
MORE = [dict(tied=False), dict(head_bias=True), dict(tied=False, embedding_width=8)]


@pytest.mark.parametrize('head', [*HEADS, *(pytest.param(h, marks=pytest.mark.slow) for h in MORE)],
                         ids=str)
def test_losses_of_hidden_states_are_those_of_the_logits(head):
  config = DecoderConfig(vocabulary=32, width=16, layers=1, heads=2, groups=1, head_width=8,
                         hidden=16, context=8, **head)
  module = Decoder(config)
  tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 32)
  batch = dict(tokens=tokens, mask=jnp.ones((3, 8), bool).at[1, 5:].set(False))
  student, teacher = (jax.jit(module.init)(jax.random.key(k), tokens)['params'] for k in (1, 2))
  plain = 'head_bias' in head or 'embedding_width' in head
  assert (hidden(module, student, batch) is None) == plain

  def of_logits(params):
    (y, _), (target, _) = (forward(module, p, batch) for p in (params, teacher))
    wanted, mask = targets(batch)
    hard = cross_entropy(y, wanted, mask)
    return .25 * soft_labels(y, target, mask, temperature=3.) + .75 * hard, hard

  mixed = lambda params: distillation(module, module, temperature=3., soft_weight=.25)(
      params, batch, None, teacher_params=teacher)
  value_and_grads = lambda f: jax.tree.leaves(jax.jit(jax.value_and_grad(f))(student))
  hard = lambda params: next_token(module)(params, batch, None)[0]
  for ours, theirs in ((lambda p: mixed(p)[0], lambda p: of_logits(p)[0]),
                       (hard, lambda p: of_logits(p)[1])):
    for a, b in zip(value_and_grads(ours), value_and_grads(theirs)):
      np.testing.assert_allclose(a, b, atol=2e-6)        # float32: another order of the same sums
  np.testing.assert_allclose(mixed(student)[1]['hard'], of_logits(student)[1], rtol=1e-6)


def test_a_head_that_is_not_of_floats_has_its_own_product():
  config = DecoderConfig(vocabulary=32, width=16, layers=1, heads=2, groups=1, head_width=8,
                         hidden=16, context=8, tied=False)
  tokens = jnp.zeros((1, 4), jnp.int32)
  params = jax.jit(config.module.init)(jax.random.key(1), tokens)['params']
  assert hidden(config.module, params, dict(tokens=tokens)) is not None
  params = methods.apply(params, (dict(where='head/.*', method='lora', rank=2, alpha=4),),
                         jax.random.key(1))
  assert hidden(config.module, params, dict(tokens=tokens)) is None


@pytest.mark.parametrize(('change', 'says'), [
    (dict(target=jnp.zeros((2, 5, 12))), '11.*12'), (dict(temperature=0.), 'temperature'),
    (dict(temperature=-1.), 'temperature')])
def test_bad_arguments_are_refused(change, says):
  arguments = dict(logits=logits(0), target=logits(1), mask=jnp.ones((2, 5)),
                   temperature=1.) | change
  with pytest.raises(InputError, match=says):
    soft_labels(**arguments)


def test_alternating_layers_are_every_other_one():
  assert alternating(12, 6) == (0, 2, 4, 6, 8, 10)
  assert alternating(5, 2) == (0, 2)
  assert alternating(4, 4) == (0, 1, 2, 3)
  for keep in (0, 5):
    with pytest.raises(InputError, match='1 to 4'):
      alternating(4, keep)


def test_a_student_made_of_all_layers_is_its_teacher_and_of_some_has_those():
  config = DecoderConfig(vocabulary=32, width=16, layers=4, heads=2, groups=1, head_width=8,
                         hidden=16, context=8)
  tokens = jax.random.randint(jax.random.key(0), (3, 8), 0, 32)
  params = jax.jit(Decoder(config).init)(jax.random.key(1), tokens)['params']
  run = lambda c, p: Decoder(c).apply({'params': p}, tokens)[0]
  np.testing.assert_array_equal(run(*take_layers(config, params, (0, 1, 2, 3))),
                                run(config, params))
  smaller, some = take_layers(config, params, (0, 2))
  assert smaller.layers == 2
  np.testing.assert_array_equal(some['layers']['mlp']['up']['kernel'].value,
                                params['layers']['mlp']['up']['kernel'].value[::2])
  assert some['embed']['table'] is params['embed']['table']
