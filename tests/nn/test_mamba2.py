"""Mamba-2: the dual form over chunks, the recurrence and the definition are one function."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.nn.mamba2 import Mamba2Options, decays, ssd
from tests.nn import recurrent

PLAIN = Mamba2Options(heads=4, head_width=6, state=5, chunk=8)
CONFIGS = {
    'plain': recurrent.config_of('mamba2', mamba2=PLAIN),
    'groups, biases, limits': recurrent.config_of('mamba2', mamba2=dataclasses.replace(
        PLAIN, groups=2, bias=True, conv_bias=False, limits=(.4, .9))),
}
both = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)


def reference(config, p, x):
  """The recurrence, a token at a time, in float64."""
  o = config.mamba2
  bias = lambda name: p[name].get('bias', 0)
  u = recurrent.silu(recurrent.filtered(p['conv'], x @ p['in']['kernel'] + bias('in')))
  u, b, c = np.split(u, (o.inner, o.inner + o.groups * o.state), axis=1)
  u = u.reshape(-1, o.heads, o.head_width)
  b, c = (np.repeat(z.reshape(-1, o.groups, o.state), o.heads // o.groups, axis=1) for z in (b, c))
  dt = np.clip(recurrent.softplus(x @ p['dt']['kernel'] + bias('dt') + p['dt_bias']), *o.limits)
  h, ys = np.zeros((o.heads, o.head_width, o.state)), []
  for t in range(len(x)):
    decay = np.exp(dt[t] * -np.exp(p['A_log']))
    h = decay[:, None, None] * h + np.einsum('h,hp,hn->hpn', dt[t], u[t], b[t])
    ys.append(np.einsum('hpn,hn->hp', h, c[t]) + p['D'][:, None] * u[t])
  z = recurrent.silu(x @ p['gate']['kernel'] + bias('gate'))
  y = (np.stack(ys).reshape(len(x), -1) * z).reshape(len(x), o.groups, -1)
  y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + config.epsilon)
  return y.reshape(len(x), -1) * p['norm']['scale'] @ p['out']['kernel'] + bias('out')


@both
def test_it_is_its_equations(config):
  recurrent.check_reference(config, reference)


@both
def test_pieces_are_the_whole(config):
  recurrent.check_pieces(config)


def test_gradients_are_those_of_the_recurrence():
  recurrent.check_gradients(CONFIGS['groups, biases, limits'])


@both
def test_padding_is_as_if_it_were_not_there(config):
  recurrent.check_padding(config)


def test_it_works_in_a_stack():
  recurrent.check_decoder(CONFIGS['plain'])


def operands(T, H=4, G=2, P=3, N=5):
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  return (draw(0, 2, T, H, P), jax.nn.softplus(draw(1, 2, T, H)), -jnp.exp(draw(2, H)),
          draw(3, 2, T, G, N), draw(4, 2, T, G, N), draw(5, 2, H, P, N))


@pytest.mark.parametrize('T', [1, 8, 9, 21, *(pytest.param(T, marks=pytest.mark.slow)
                                               for T in (2, 7, 16))])
def test_borders_of_chunks_do_not_show(T):
  args = operands(T)
  x, dt, a, b, c, h = (np.asarray(x, np.float64) for x in args)
  b, c, ys = np.repeat(b, 2, axis=2), np.repeat(c, 2, axis=2), []
  for t in range(T):
    h = np.exp(dt[:, t] * a)[:, :, None, None] * h + np.einsum(
        'bh,bhp,bhn->bhpn', dt[:, t], x[:, t], b[:, t])
    ys.append(np.einsum('bhpn,bhn->bhp', h, c[:, t]))
  for chunk in (8, 64):
    y, last = ssd(*args, chunk)
    np.testing.assert_allclose(y, np.stack(ys, axis=1), atol=2e-5)
    np.testing.assert_allclose(last, h, atol=2e-5)


def test_what_is_left_of_a_token_keeps_its_digits_after_a_steep_stretch():
  log = np.concatenate([np.full(100, -40.), np.full(28, -.01)])
  got = decays(jnp.asarray(log, jnp.float32))[-1, 100:]
  want = np.exp(-.01 * np.arange(27, -1, -1))
  np.testing.assert_allclose(got, want, rtol=1e-6)           # by differences it would be 1e-4
