"""What must hold of every mixer that keeps a state, whatever its equations."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from lean_jax.models.cache import Slot
from lean_jax.models.config import Layer
from lean_jax.models.decoder import Decoder, DecoderConfig
from lean_jax.models.frame import Frame
from lean_jax.models.kinds import MIXERS
from lean_jax.nn.attention import AttentionOptions

B, T, D, V = 3, 19, 16, 29


def config_of(kind, **kw):
  """A decoder's config whose layers are of one kind."""
  return DecoderConfig(
      vocabulary=V, width=D, layers=2, context=64, attention=AttentionOptions(ropes=()),
      kinds=(Layer(mixer=kind, feed_forward=None),) * 2, **kw)


def mixer(config):
  """The mixer of a config, and its parameters away from their start."""
  module = MIXERS[config.kinds[0].mixer].module(config)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2, D)), Frame(), None, None)
  rng = np.random.default_rng(0)
  return module, jax.tree.map(
      lambda x: x + jnp.asarray(.2 * rng.normal(size=x.shape), x.dtype), params['params'])


def plain(params):
  """Parameters as numpy's float64, without boxes."""
  return jax.tree.map(lambda x: np.asarray(x, np.float64), meta.unbox(params))


def inputs(seed=1, T=T):
  return jax.random.normal(jax.random.key(seed), (B, T, D))


def slot(config):
  """An empty state of one layer."""
  shapes = MIXERS[config.kinds[0].mixer].state_shapes(config, B, 0)
  return Slot({k: jnp.zeros(shape, dtype) for k, (shape, dtype) in shapes.items()})


def check_reference(config, reference):
  """The mixer is `reference(config, params, x [T D])`, float64, which goes token by token."""
  module, params = mixer(config)
  x = inputs()
  got = jax.jit(lambda p, x: module.apply({'params': p}, x, Frame(), None, None)[0])(params, x)
  want = np.stack([reference(config, plain(params), np.asarray(row, np.float64)) for row in x])
  np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def check_pieces(config):
  """Tokens in pieces, of several and of one, give what all at once do, and the same state."""
  module, params = mixer(config)
  x = inputs()
  run = jax.jit(lambda x, slot: module.apply({'params': params}, x, Frame(), None, slot))
  want, none = module.apply({'params': params}, x, Frame(), None, None)
  assert none is None
  whole, state = run(x, slot(config))
  parts, s = [], slot(config)
  for start, end in ((0, 9), (9, 10), (10, T)):
    y, s = run(x[:, start:end], s)
    parts.append(y)
  scale = float(jnp.abs(want).max())
  np.testing.assert_allclose(whole, want, atol=1e-6 * scale)
  np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-5 * scale)
  for k in state.arrays:
    np.testing.assert_allclose(s.arrays[k], state.arrays[k], atol=2e-6, err_msg=k)


def check_gradients(config):
  """Gradients of the whole are those of a token at a time."""
  module, params = mixer(config)
  x, weight = inputs(), inputs(2)

  def stepwise(p, x):
    def step(s, x):
      y, s = module.apply({'params': p}, x[:, None], Frame(), None, s)
      return s, y[:, 0]
    return jnp.moveaxis(jax.lax.scan(step, slot(config), jnp.moveaxis(x, 1, 0))[1], 0, 1)
  whole = lambda p, x: module.apply({'params': p}, x, Frame(), None, None)[0]
  grad = lambda f: jax.jit(jax.grad(lambda p, x: jnp.sum(f(p, x) * weight), (0, 1)))(params, x)
  got, want = grad(whole), grad(stepwise)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)):
    assert np.isfinite(a).all() and np.abs(b).max() > 0, path
    # float32 sums of 57 tokens in another order
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=str(path))


def check_padding(config):
  """Padding anywhere changes neither the real tokens nor the state, whatever it holds."""
  module, params = mixer(config)
  run = jax.jit(lambda x, mask, slot: module.apply({'params': params}, x, Frame(mask=mask), None,
                                                   slot))
  step = jax.jit(lambda x, slot: module.apply({'params': params}, x, Frame(), None, slot))

  def skipping(x, mask, state):
    ys = []
    for t in range(x.shape[1]):
      y, new = step(x[:, t:t + 1], state)
      keep = lambda new, old, t=t: jnp.where(
          mask[:, t].reshape(B, *(1,) * (old.ndim - 1)), new, old)
      state = jax.tree.map(keep, new, state)
      ys.append(y)
    return jnp.concatenate(ys, axis=1), state

  _, begun = skipping(inputs(4)[:, :6], np.ones((B, 6), bool), slot(config))
  lengths, at = np.array([T, T - 5, 0])[:, None], np.arange(T)[None]
  scattered = np.random.default_rng(3).random((B, T)) < .6
  for mask in (at < lengths, at >= T - lengths, scattered):
    x = jnp.where(mask[:, :, None], inputs(), 1e3 * inputs(5))
    for state in (begun, slot(config)):
      (want, last), (got, now) = skipping(x, mask, state), run(x, jnp.asarray(mask), state)
      close = dict(rtol=0, atol=1e-5 * float(jnp.abs(want[mask]).max()))
      np.testing.assert_allclose(got[mask], want[mask], **close)
      jax.tree.map(lambda a, z: np.testing.assert_allclose(
          a, z, atol=1e-5 * float(jnp.abs(z).max())), now, last)
    np.testing.assert_allclose(run(x, jnp.asarray(mask), None)[0][mask], want[mask], **close)


def check_decoder(config):
  """In a stack: remat changes nothing, bfloat16 stays close."""
  module = Decoder(config)
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)
  params = jax.jit(module.init)(jax.random.key(0), tokens[:, :2])['params']
  run = lambda p, **kw: Decoder(dataclasses.replace(config, **kw)).apply({'params': p}, tokens)[0]
  grad = lambda **kw: jax.jit(jax.grad(lambda p: run(p, **kw).var()))(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), grad(remat=True), grad())
  want, half = jax.jit(run)(params), jax.jit(lambda p: run(p, dtype='bfloat16'))(params)
  # eight bits of mantissa, through two layers
  np.testing.assert_allclose(half, want, atol=.05 * float(jnp.abs(want).max()))


def softplus(x):
  return np.logaddexp(0, x)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def filtered(p, x):
  """A short convolution, from its definition: x [T C]."""
  K = len(p['kernel'])
  past = np.concatenate([np.zeros((K - 1, x.shape[1])), x])
  y = np.stack([(past[t:t + K] * p['kernel']).sum(0) for t in range(len(x))])
  return y + p.get('bias', 0)
