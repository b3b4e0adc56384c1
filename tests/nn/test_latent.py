"""Latent attention: the cache of latents gives what keys and values of every head do."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from lean_jax.models.config import Layer
from lean_jax.models.decoder import Decoder, DecoderConfig, empty_cache
from lean_jax.models.frame import Place, framed
from lean_jax.nn import latent
from lean_jax.nn.latent import LatentOptions

B, T, V = 2, 9, 17


def model(**kw):
  o = dict(query_rank=6, rank=12, plain_width=6, rope_width=4, value_width=10) | kw
  c = DecoderConfig(vocabulary=V, width=16, layers=2, heads=3, hidden=20, context=16,
                    latent=LatentOptions(**o), kinds=(Layer(mixer='latent'),) * 2)
  module = Decoder(c)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  rng = np.random.default_rng(0)
  return module, jax.tree.map(
      lambda x: x + jnp.asarray(.2 * rng.normal(size=x.shape), jnp.float32), params)


# Of narrow heads' latents, the first six queries make keys; in the others nobody does.
@pytest.mark.parametrize('kw', [{}, dict(query_rank=None, bias=True, scale=.2),
                                dict(plain_width=2, value_width=4)],
                         ids=['', 'plain queries', 'narrow heads'])
def test_the_cache_gives_what_the_whole_does(kw):
  module, params = model(**kw)
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)
  mask = jnp.asarray([[True] * T, [False] * 3 + [True] * (T - 3)])
  run = jax.jit(lambda t, m, cache, at: module.apply({'params': params}, t, cache, at, m))
  want = module.apply({'params': params}, tokens, mask=mask)[0]
  cache, got = empty_cache(module.config, B, T + 2), []
  for start, end in ((0, 6), (6, 7), (7, 9)):
    y, cache = run(tokens[:, start:end], mask[:, start:end], cache, start)
    got.append(y)
  keep = mask[:, :, None]
  np.testing.assert_allclose(jnp.where(keep, jnp.concatenate(got, axis=1), 0),
                             jnp.where(keep, want, 0), atol=1e-5 * float(jnp.abs(want).max()))
  plain = module.apply({'params': params}, tokens)[0]          # the path of training
  np.testing.assert_allclose(plain[0], want[0], atol=1e-5 * float(jnp.abs(want).max()))


def test_a_layer_is_its_equations():
  """Section 2.1 of the paper in float64, one query and one head at a time."""
  module, params = model()
  c, o = module.config, module.config.latent
  p = jax.tree.map(lambda w: np.asarray(meta.unbox(w), np.float64)[0],
                   params['layers']['latent'], is_leaf=lambda w: isinstance(w, meta.AxisMetadata))
  x = np.random.default_rng(0).normal(size=(5, 16))
  norm = lambda h, name: h / np.sqrt((h ** 2).mean(-1, keepdims=True) + 1e-6) * p[name]['scale']
  q = norm(x @ p['q_a']['kernel'], 'q_a_norm') @ p['q_b']['kernel']
  joint = x @ p['kv_a']['kernel']
  lat = norm(joint[:, :o.rank], 'kv_a_norm')

  def turn(h, t):
    half = o.rope_width // 2
    angle = t * 10_000. ** (-2 * np.arange(half) / o.rope_width)
    a, b = h[:half], h[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)])
  y = np.zeros((5, c.heads, o.value_width))
  for h in range(c.heads):
    cut = lambda a, n, h=h: a[..., h * n:(h + 1) * n]
    qh = cut(q, o.plain_width + o.rope_width)
    k, v = (lat @ cut(p[name]['kernel'], w)
            for name, w in (('k_b', o.plain_width), ('v_b', o.value_width)))
    for t in range(5):
      scores = np.array([qh[t, :o.plain_width] @ k[s] + turn(qh[t, o.plain_width:], t)
                         @ turn(joint[s, o.rank:], s) for s in range(t + 1)])
      scores = scores * (o.plain_width + o.rope_width) ** -.5
      e = np.exp(scores - scores.max())
      y[t, h] = e / e.sum() @ v[:t + 1]
  want = y.reshape(5, -1) @ p['o']['kernel']
  _, frame, _ = framed(c, jnp.zeros((1, 5), jnp.int32), None, 0, None)
  one = jax.tree.map(lambda a: a[0], params['layers']['latent'])
  one = jax.tree.map(lambda w: w.remove_axis(0, {}) if isinstance(w, meta.AxisMetadata) else w, one,
                     is_leaf=lambda w: isinstance(w, meta.AxisMetadata))
  got, _ = latent.LatentAttention(c).apply(
      {'params': one}, jnp.asarray(x, jnp.float32)[None], frame, Place(), None)
  np.testing.assert_allclose(got[0], want, atol=2e-5 * np.abs(want).max())


def test_the_cache_is_a_latent_and_a_rotary_key_a_token():
  module, _ = model()
  arrays = empty_cache(module.config, B, T)['layers']
  assert {k: a.shape for k, a in arrays.items()} == dict(latent=(2, B, T, 12), key=(2, B, T, 4))


def test_many_queries_make_keys_and_few_do_not():
  o = LatentOptions(query_rank=1536, rank=512, plain_width=128, rope_width=64, value_width=128)
  assert latent.few(1, o) and not latent.few(1024, o)
  narrow = model(plain_width=2, value_width=4)[0].config.latent
  assert latent.few(2, narrow) and not latent.few(6, narrow)
