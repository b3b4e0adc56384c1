"""attention_decode: every implementation is attention to the numbers that the codes stand for."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.kernels.attention_decode import api
from lean_jax.kernels.attention_decode.api import (
  Codes,
  attention_decode,
  attention_decode_paged,
)
from lean_jax.nn.rounded import Rounding, decoded, encoded
from tests.kernels.races import WATCHED, seen

G, B, R, S, K, g = 2, 3, 4, 256, 64, 32
N = G * B


def pallas(name):
  """The kernel in an interpreter, as an implementation: a patch of `api.chosen`."""
  how = dict(interpret=True, races=WATCHED)[name]
  return lambda op, forms, _: functools.partial(
      next(f for f in forms if f.name == 'pallas').run, interpret=how)


@pytest.fixture(params=['xla', 'reference', 'interpret'])
def form(request, monkeypatch):
  """The name of an implementation; the kernel's is patched in."""
  if request.param != 'interpret':
    return request.param
  monkeypatch.setattr(api, 'chosen', pallas('interpret'))
  monkeypatch.setattr(api.tpu, 'PAGE', 128)                # two pages a row
  return None


def operands(bits, seed=0, shape=(N, S, K), dtype='float32'):
  """Queries, Codes of keys and values whose channels lie apart, and their numbers in float64."""
  draw = np.random.default_rng(seed)
  known = jnp.ones((*shape[:2], 1), bool)
  q = jnp.asarray(draw.normal(size=(N, R, K)), dtype)
  out, floats = [], []
  for per_token in (False, True):
    x = draw.normal(size=shape) + 2 * draw.normal(size=K)
    code = encoded(jnp.asarray(x, jnp.float32), known, Rounding(bits, g), per_token=per_token)
    out.append(Codes(*code))
    floats.append(np.asarray(decoded(*code, Rounding(bits, g), jnp.float32), np.float64))
  return q, *out, *floats


def attention64(q, k, v, visible, scale=K ** -.5, softcap=None, sinks=None):
  """Attention in float64; visible [N S]."""
  s = np.einsum('nrk,nsk->nrs', np.asarray(q, np.float64), k) * scale
  s = s if softcap is None else softcap * np.tanh(s / softcap)
  p = np.exp(s - s.max()) * np.asarray(visible)[:, None]
  total = p.sum(-1, keepdims=True)
  if sinks is not None:
    total = total + np.exp(np.asarray(sinks, np.float64)[..., None] - s.max())
  return np.einsum('nrs,nsk->nrk', p / total, v)


def ragged():
  """[B S], tokens that texts of other lengths, and padding, leave visible."""
  at = np.arange(S)[None]
  return jnp.asarray((at < [[S], [140], [33]]) & (at >= [[0], [7], [0]]))


# Float32: scores of order 10 are off by some 1e-6, probabilities by as much of themselves.
CLOSE = dict(atol=2e-5)


@pytest.mark.parametrize('bits', [8, 4])
def test_it_is_attention_to_the_numbers_of_the_codes(form, bits):
  q, k, v, *floats = operands(bits)
  got = attention_decode(q, k, v, ragged(), bits=bits, implementation=form)
  want = attention64(q, *floats, np.tile(ragged(), (G, 1)))
  np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize('length', [0, 32, 160])
def test_recent_tokens_are_read_as_floats_and_codes_past_them_not_at_all(form, length):
  q, k, v, *floats = operands(4)
  draw = np.random.default_rng(1)
  near = tuple(jnp.asarray(draw.normal(size=(N, g, K)), jnp.float32) for _ in 'kv')
  sinks = jnp.asarray(draw.normal(size=(N, R)), jnp.float32)
  seen = jnp.arange(S)[None] < jnp.asarray([[S], [length + 20], [length + 1]])
  got = jax.jit(lambda length: attention_decode(
      q, k, v, seen, bits=4, length=length, recent=near, sinks=sinks, softcap=3., scale=.4,
      implementation=form))(length)
  for x, y in zip(floats, near):
    x[:, length:length + g] = y
  visible = np.tile(seen, (G, 1)) & (np.arange(S) < length + g)
  want = attention64(q, *floats, visible, scale=.4, softcap=3., sinks=sinks)
  np.testing.assert_allclose(got, want, **CLOSE)


@pytest.mark.parametrize('bits', [8, 4])
def test_a_layer_of_many_is_read_where_it_stands(form, bits):
  q, k, v, *_ = operands(bits)
  other = operands(bits, seed=1)
  stacked = [Codes(*(jnp.stack(x) for x in zip(b, a, b))) for a, b in zip((k, v), other[1:3])]
  alone = attention_decode(q, k, v, ragged(), bits=bits, implementation=form)
  got = jax.jit(lambda n: attention_decode(q, *stacked, ragged(), bits=bits, layer=n,
                                           implementation=form))(1)
  np.testing.assert_allclose(got, alone, atol=1e-6)        # compiled apart, sums may be ordered so


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.parametrize('window', [None, 40])
def test_pages_in_any_order_are_the_text(form, bits, window):
  q, k, v, *floats = operands(bits)
  n, M = 64, S // 64
  lengths = jnp.asarray([S, 1, 64, 65, 200, 129])
  draw = np.random.default_rng(2)
  table = draw.permutation(N * M + 3)[:N * M].reshape(N, M)
  pool = lambda x: jnp.zeros((N * M + 3, x.shape[1] // M, x.shape[2]), x.dtype).at[
      table.reshape(-1)].set(x.reshape(N * M, -1, x.shape[2]))
  k, v = (Codes(*map(pool, x)) for x in (k, v))
  # Where a row has ended, its pages may be any.
  table = jnp.where(jnp.arange(M)[None] * n < lengths[:, None], table, 0)
  got = attention_decode_paged(q, k, v, table, lengths, bits=bits, window=window,
                               implementation=form)
  at, ends = np.arange(S)[None], np.asarray(lengths)[:, None]
  visible = (at < ends) & (at >= ends - (window or S))
  np.testing.assert_allclose(got, attention64(q, *floats, visible), **CLOSE)


@pytest.mark.parametrize('bits', [8, 4])
def test_the_kernel_has_no_races_and_reads_nothing_unwritten(bits, monkeypatch):
  q, k, v, *floats = operands(bits)
  monkeypatch.setattr(api, 'chosen', pallas('races'))
  monkeypatch.setattr(api.tpu, 'PAGE', 128)                # 6 rows of 2 pages: 12 steps
  got = np.asarray(attention_decode(q, k, v, ragged(), bits=bits))
  assert not seen()
  want = attention64(q, *floats, np.tile(ragged(), (G, 1)))
  np.testing.assert_allclose(got, want, **CLOSE)


def test_bfloat16_queries_read_keys_and_values_in_bfloat16(form):
  q, k, v, *floats = operands(8, dtype='bfloat16')
  got = attention_decode(q, k, v, ragged(), bits=8, implementation=form)
  assert got.dtype == jnp.bfloat16
  want = attention64(q, *floats, np.tile(ragged(), (G, 1)))
  # Keys of up to 8 rounded to 2 ** -9 move 64-term scores / 8 by some 2 ** -6; values too.
  np.testing.assert_allclose(np.asarray(got, 'f4'), want, atol=.06)


def test_a_row_that_sees_nothing_is_zeros_and_a_nan_stays_in_its_row(form):
  q, k, v, *_ = operands(8)
  q = q.at[1, 2].set(jnp.nan)
  seen = ragged().at[2].set(False)
  got = attention_decode(q, k, v, seen, bits=8, implementation=form)
  assert not got[2].any() and not got[5].any()
  assert jnp.isnan(got).any(axis=(0, 2)).tolist() == [False, False, True, False]
  assert jnp.isnan(got[1, 2]).all()
  v = v._replace(scale=v.scale.at[0, 3].set(jnp.nan))
  got = attention_decode(q, k, v, ragged(), bits=8, implementation=form)
  assert jnp.isnan(got[0]).any() and not jnp.isnan(got[3]).any()


REFUSED = [
    (dict(bits=3), '8 or 4'), (dict(bits=4), '4 bits'), (dict(q=jnp.ones((N, K))), r'\[N R K\]'),
    (dict(q=jnp.ones((N, R, K), int)), 'floats'), (dict(q=jnp.ones((N, R, K + 1))), 'do not fit'),
    (dict(visible=jnp.ones((4, S), bool)), 'B dividing 6'),
    (dict(visible=jnp.ones((B, S + 1), bool)), 'at most'),
    (dict(recent=(jnp.ones((N, g, K)),) * 2), 'length None'),
    (dict(recent=(jnp.ones((N, g + 1, K)),) * 2, length=32), 'recent'),
    (dict(k=Codes(jnp.ones((N, S, K), 'uint8'), *[jnp.ones((N, S // g, K))] * 2)), 'float16'),
    (dict(sinks=jnp.ones(R)), 'sinks'), (dict(implementation='pallas'), 'runs on tpu'),
    (dict(implementation='fast'), 'there are')]


@pytest.mark.parametrize(('change', 'says'), REFUSED, ids=[says for _, says in REFUSED])
def test_what_does_not_fit_is_refused(change, says):
  q, k, v, *_ = operands(8)
  with pytest.raises(ValueError, match=says):
    attention_decode(**dict(q=q, k=k, v=v, visible=ragged(), bits=8) | change)


@pytest.mark.parametrize(('change', 'says'), [
    (dict(table=jnp.zeros((N, 2))), 'integers'), (dict(lengths=jnp.zeros(2, int)), 'lengths'),
    (dict(window=0), 'window'), (dict(sinks=jnp.ones(R)), 'sinks')])
def test_pages_that_do_not_fit_are_refused(change, says):
  q, k, v, *_ = operands(8)
  given = dict(q=q, k=k, v=v, table=jnp.zeros((N, 1), int), lengths=jnp.ones(N, int), bits=8)
  with pytest.raises(ValueError, match=says):
    attention_decode_paged(**given | change)
