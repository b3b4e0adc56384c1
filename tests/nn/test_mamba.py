"""Mamba: its scan over chunks, its recurrence and the definition are one function."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.nn.mamba import MambaOptions, recurrence, selective_scan
from tests.nn import recurrent

PLAIN = MambaOptions(inner=12, state=5, rank=3, chunk=8)
CONFIGS = {
    'plain': recurrent.config_of('mamba', mamba=PLAIN),
    'normed, biases': recurrent.config_of('mamba', mamba=dataclasses.replace(
        PLAIN, norm=True, bias=True, conv_bias=False, conv=2, activation='gelu_tanh')),
}
both = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)


def reference(config, p, x):
  """Algorithm 2 of the paper, a token at a time, in float64."""
  o = config.mamba
  bias = lambda name: p[name].get('bias', 0)
  u = recurrent.filtered(p['conv'], x @ p['in']['kernel'] + bias('in'))
  if o.activation == 'silu':
    u = recurrent.silu(u)
  else:
    u = .5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + .044715 * u ** 3)))
  dt, b, c = np.split(u @ p['select']['kernel'], (o.rank, o.rank + o.state), axis=1)
  if o.norm:
    dt, b, c = (h / np.sqrt((h ** 2).mean(1, keepdims=True) + config.epsilon) * p[name]['scale']
                for name, h in (('dt_norm', dt), ('B_norm', b), ('C_norm', c)))
  dt = recurrent.softplus(dt @ p['dt']['kernel'] + p['dt_bias'])
  h, ys = np.zeros((o.inner, o.state)), []
  for t in range(len(x)):
    h = np.exp(dt[t, :, None] * -np.exp(p['A_log'])) * h + (dt[t] * u[t])[:, None] * b[t]
    ys.append(h @ c[t] + p['D'] * u[t])
  y = np.stack(ys) * recurrent.silu(x @ p['gate']['kernel'] + bias('gate'))
  return y @ p['out']['kernel'] + bias('out')


@both
def test_it_is_its_equations(config):
  recurrent.check_reference(config, reference)


@both
def test_pieces_are_the_whole(config):
  recurrent.check_pieces(config)


def test_gradients_are_those_of_the_recurrence():
  recurrent.check_gradients(CONFIGS['normed, biases'])


def test_padding_is_as_if_it_were_not_there():
  recurrent.check_padding(CONFIGS['plain'])


def test_it_works_in_a_stack():
  recurrent.check_decoder(CONFIGS['plain'])


def operands(T, N=4, I=6):
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  return (draw(0, 2, T, I), jax.nn.softplus(draw(1, 2, T, I)), -jnp.exp(draw(2, N, I)),
          draw(3, 2, T, N), draw(4, 2, T, N), draw(5, 2, N, I))


@pytest.mark.parametrize('T', [1, 2, 7, 8, 9, 16, 21])
def test_borders_of_chunks_do_not_show(T):
  args = operands(T)
  want = [np.asarray(x, np.float64) for x in args]
  h, ys = want[5], []
  for t in range(T):
    u, dt, b, c = (want[k][:, t] for k in (0, 1, 3, 4))
    h = np.exp(dt[:, None] * want[2]) * h + b[:, :, None] * (dt * u)[:, None]
    ys.append(np.einsum('bni,bn->bi', h, c))
  for chunk in (8, 64):
    y, last = selective_scan(*args, chunk)
    np.testing.assert_allclose(y, np.stack(ys, axis=1), atol=1e-5)
    np.testing.assert_allclose(last, h, atol=1e-5)


def test_the_gradient_of_a_recurrence_is_a_recurrence():
  a, b, h = (jax.random.uniform(jax.random.key(k), s) for k, s in enumerate(
      [(2, 9, 3), (2, 9, 3), (2, 3)]))
  weight = jax.random.normal(jax.random.key(3), b.shape)

  def stepwise(a, b, h):
    out = []
    for t in range(9):
      h = a[:, t] * h + b[:, t]
      out.append(h)
    return jnp.stack(out, axis=1)
  grad = lambda f: jax.grad(lambda *x: jnp.sum(f(*x) * weight), (0, 1, 2))(a, b, h)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
               grad(recurrence), grad(stepwise))


def test_states_of_a_chunk_and_no_more_are_in_memory():
  I, N, T = 8, 16, 512
  args = operands(T, N, I)
  grad = jax.jit(jax.grad(lambda *x: selective_scan(*x, 16)[0].var(), (0, 1, 2, 3, 4)))
  # In float32, and for two rows; all states would take 64 times the inputs' own.
  states = 4 * 2 * T * N * I
  assert grad.lower(*args).compile().memory_analysis().temp_size_in_bytes < states
