"""GPTQ, AWQ, SmoothQuant, HQQ and ranges against float64 written from the papers."""
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import methods
from lean_jax.calibration import statistics
from lean_jax.errors import InputError
from lean_jax.quantization.awq import ALPHAS, awq, awq_scales
from lean_jax.quantization.clip import PARTS
from lean_jax.quantization.gptq import gptq
from lean_jax.quantization.hqq import hqq
from lean_jax.quantization.ranges import input_step
from lean_jax.quantization.rtn import rtn
from lean_jax.quantization.smoothquant import smooth_scales
from lean_jax.quantization.spec import parse_spec
from lean_jax.weights import Dense

I, O, M = 24, 10, 200
draw = np.random.default_rng(0)
# Inputs that hang together, some much larger than others.
X = (draw.normal(size=(M, I)) @ (np.eye(I) + .3 * draw.normal(size=(I, I)))
     * np.exp(draw.normal(size=I))).astype(np.float32)
W = draw.normal(size=(I, O)).astype(np.float32)
STATS = statistics.of_matrix(jnp.asarray(X))
dense = lambda w: Dense(jnp.asarray(w), 'io', (None, None))
values = lambda w: np.asarray(w.matrix(jnp.float32), np.float64)
product_error = lambda w: float(np.sum((X @ (values(w) - W)) ** 2))


def grids(w, group, bits, symmetric, dtype):
  """scale and zero [G O] of each group by its range, the scale as it is stored."""
  scales, zeros = [], []
  for start in range(0, len(w), group):
    part = w[start:start + group]
    high = 2 ** (bits - 1) - 1 if symmetric else 2 ** bits - 1
    if symmetric:
      scale = np.abs(part).max(0) / high
      zero = np.zeros(part.shape[1])
    else:
      low, top = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
      scale = (top - low) / high
      zero = None
    scale = np.asarray(jnp.asarray(scale, dtype), np.float64)
    zeros.append(np.clip(np.round(-low / scale), 0, high) if zero is None else zero)
    scales.append(scale)
  return np.stack(scales), np.stack(zeros)


def obq(w, H, scale, zero, group, bits, symmetric, order, damping):
  """Optimal brain quantization in a fixed order, by its definition: after each row the inverse of
  the Hessian of the rows that are left is made anew (arXiv:2210.17323, equations 2 and 3)."""
  w, H = w.astype(np.float64).copy(), H.astype(np.float64)
  H = H + damping * np.mean(np.diag(H)) * np.eye(len(H))
  low = -(2 ** (bits - 1)) if symmetric else 0
  out, left = np.zeros_like(w), list(order)
  while left:
    i = left[0]
    inverse = np.linalg.inv(H[np.ix_(left, left)])
    s, z = scale[i // group], zero[i // group]
    code = np.clip(np.round(w[i] / s + z), low, low + 2 ** bits - 1)
    out[i] = (code - z) * s
    error = (w[i] - out[i]) / inverse[0, 0]
    w[left] -= inverse[:, :1] * error[None]
    left = left[1:]
  return out


@pytest.mark.parametrize(('text', 'act_order'), [
    ('w4a16-g8', False), ('w3a16-g8-asym', True), ('w4a16', True), ('w2a16-g5', False)])
def test_gptq_is_optimal_brain_quantization_in_its_order(text, act_order):
  spec = parse_spec(text)
  found = gptq(dense(W), text, STATS, act_order=act_order)
  got = values(found)
  H = X.astype(np.float64).T @ X
  order = np.argsort(-np.diag(H), kind='stable') if act_order else range(I)
  group = spec.group or I
  scale, zero = grids(W, group, spec.bits, spec.symmetric, found.scale.dtype)
  wanted = obq(W, H, scale, zero, group, spec.bits, spec.symmetric, order, .01)
  # A code may fall the other way where float32 is at the middle of two; then all after it differ.
  assert np.mean(np.abs(got - wanted) < 1e-3 * np.abs(W).max()) > .97
  assert product_error(gptq(dense(W), text, STATS)) < .7 * product_error(rtn(dense(W), text))


@pytest.mark.parametrize('text', ['nf4-g8', 'nf4-g8-dq', 'fp4-g8', 'fp8', 'mxfp4', 'w1.58a16',
                                  'w1a16', 'w3a16'])
def test_gptq_takes_every_format(text):
  w = draw.normal(size=(64, O)).astype(np.float32) if text == 'mxfp4' else W
  x = draw.normal(size=(M, 64)).astype(np.float32) if text == 'mxfp4' else X
  stats = statistics.of_matrix(jnp.asarray(x)) if text == 'mxfp4' else STATS
  off = lambda q: np.sum((x @ (values(q) - w)) ** 2)
  got = gptq(dense(w), text, stats)
  assert str(got.spec) == str(parse_spec(text))
  assert off(got) < off(rtn(dense(w), text))


def test_gptq_leaves_out_inputs_that_were_always_zero_and_damps_what_is_singular():
  x = X.copy()
  x[:, 3] = 0
  x = x[:18]                                           # fewer than 24 inputs: H is singular
  with pytest.warns(UserWarning, match='singular: damped 10+ times as much'):
    got = gptq(dense(W), 'w4a16-g8', statistics.of_matrix(jnp.asarray(x)), damping=0.)
  assert np.isfinite(values(got)).all() and not values(got)[3].any()
  few = statistics.of_matrix(jnp.asarray(x[:5]))       # fewer than inputs need: rounded to nearest
  np.testing.assert_array_equal(values(gptq(dense(W), 'w4a16-g8', few)),
                                values(rtn(dense(W), 'w4a16-g8')))


def test_gptq_treats_each_expert_by_itself():
  w = draw.normal(size=(3, I, O)).astype(np.float32)
  sizes = np.array([60, 140, 0])                       # of the last, nothing is known
  stats = statistics.of_groups(jnp.asarray(X), jnp.asarray(sizes))
  got = gptq(Dense(jnp.asarray(w), 'eio', (None,) * 3), 'w4a16-g8', stats)
  start = 0
  for k, size in enumerate(sizes):
    alone = gptq(dense(w[k]), 'w4a16-g8', statistics.of_matrix(
        jnp.asarray(X[start:start + size]))) if size else rtn(dense(w[k]), 'w4a16-g8')
    agree = np.isclose(values(got)[k], values(alone), atol=1e-5)
    assert agree.mean() > .97                          # of one expert, to rounding at a middle
    start += size


def test_awq_takes_the_scales_that_leave_the_least_error():
  spec = parse_spec('w3a16-g8')
  size = np.abs(X.astype(np.float64)).mean(0)
  found = []
  for alpha in ALPHAS.astype(np.float64):
    s = size ** alpha
    s = s / np.sqrt(s.max() * s.min())
    q = values(rtn(dense((W * s[:, None]).astype(np.float32)), spec)) / s[:, None]
    found.append((np.sum((X @ (q - W)) ** 2), alpha))
  least, alpha = min(found)
  got = np.asarray(awq_scales([jnp.asarray(W)], [STATS], spec))
  s = size ** alpha
  np.testing.assert_allclose(got, s / np.sqrt(s.max() * s.min()), rtol=1e-3)
  assert alpha > 0 and least < found[0][0]


def test_awq_clips_where_that_makes_the_error_of_products_smaller():
  whole, cut = awq(dense(W), 'w3a16-g8', STATS, clip='absmax'), awq(dense(W), 'w3a16-g8', STATS)
  np.testing.assert_array_equal(values(whole), values(rtn(dense(W), 'w3a16-g8')))
  # The error within each group, which is what it searches, is least of all parts of the range.
  inside = lambda q: sum(np.sum((X[:, k:k + 8] @ (q - W)[k:k + 8]) ** 2, axis=0)
                         for k in range(0, I, 8))
  best = np.full((3, O), np.inf)
  for part in PARTS:
    q = values(rtn_shrunk(part))
    each = np.stack([np.sum((X[:, k:k + 8] @ (q - W)[k:k + 8]) ** 2, axis=0)
                     for k in range(0, I, 8)])
    best = np.minimum(best, each)
  np.testing.assert_allclose(inside(values(cut)), best.sum(0), rtol=1e-3)


def rtn_shrunk(part, text='w3a16-g8'):
  from lean_jax.weights import Quantized
  return Quantized.of(jnp.asarray(W), parse_spec(text), 'io', (None, None), float(part))


def test_clipped_rtn_has_the_least_squared_error_of_each_group():
  got = values(rtn(dense(W), 'w2a16-g8', clip='mse'))
  square = lambda q: np.stack([np.sum((q - W)[k:k + 8] ** 2, axis=0) for k in range(0, I, 8)])
  best = np.min([square(values(rtn_shrunk(p, 'w2a16-g8'))) for p in PARTS], axis=0)
  np.testing.assert_allclose(square(got), best, rtol=1e-4)


def test_smoothquant_is_its_equation_4():
  got = smooth_scales([jnp.asarray(W), jnp.asarray(2 * W)], [STATS, STATS], None, .75)
  np.testing.assert_allclose(got, np.abs(X).max(0) ** .75 / np.abs(2 * W).max(1) ** .25, rtol=1e-5)


def test_hqq_is_its_half_quadratic_splitting():
  spec, got, close = parse_spec('w2a16-g8'), hqq(dense(W), 'w2a16-g8'), []
  start = rtn(dense(W), spec)
  for k in range(0, I, 8):
    w = W[k:k + 8].astype(np.float64)
    s, z = (np.asarray(v, np.float64)[k // 8] for v in (start.scale, start.zero))
    zero, best, least, beta = z, z, np.full(O, np.inf), 10.
    for _ in range(20):
      codes = np.clip(np.round(w / s + zero), 0, 3)
      off = w - (codes - zero) * s
      found = np.abs(off).mean(0)
      best, least = np.where(found < least, zero, best), np.minimum(found, least)
      size = np.abs(off)
      shrunk = np.sign(off) * np.maximum(size - np.maximum(size, 1e-9) ** (.7 - 1) / beta, 0)
      zero, beta = (codes - (w - shrunk) / s).mean(0), beta * 1.01
    close += list(np.isclose(np.asarray(got.zero)[k // 8], best, rtol=2e-3, atol=2e-3))
    np.testing.assert_allclose(np.abs(values(got)[k:k + 8] - w).mean(), least.mean(), rtol=.02)
  assert np.mean(close) > .6       # others have met a middle of two codes, in float32 or in float64
  assert np.abs(values(got) - W).mean() < np.abs(values(start) - W).mean()


@pytest.mark.parametrize('how', ['absmax', 'percentile', 'mse'])
def test_a_static_range_is_that_of_the_inputs(how):
  x = draw.standard_t(3, size=(4000, 8)).astype(np.float32)           # with a long tail
  step = float(input_step(statistics.of_matrix(jnp.asarray(x)), how))
  error = lambda top: np.mean((x - np.clip(np.round(x / top * 127), -127, 127) * top / 127) ** 2)
  size, tops = np.abs(x), np.geomspace(1, np.abs(x).max(), 200)
  wanted = dict(absmax=size.max(), percentile=np.quantile(size, .9999, method='inverted_cdf'),
                mse=tops[np.argmin([error(t) for t in tops])])[how]
  if how == 'mse':                                     # a flat minimum: its value counts
    assert error(127 * step) < 1.03 * error(wanted)
  else:
    np.testing.assert_allclose(127 * step, wanted, rtol=1e-6 if how == 'absmax' else .023)


def test_what_cannot_be_done_is_said():
  rounded = rtn(dense(W), 'w4a16-g8')
  for method in (gptq, awq):
    with pytest.raises(InputError, match='Quantized weight cannot be rounded'):
      method(rounded, 'w4a16-g8', STATS)
  with pytest.raises(InputError, match='w4a16-g64-asym'):
    hqq(dense(W), 'w4a16-g8')
  with pytest.raises(InputError, match='absmax, percentile, mse'):
    input_step(STATS, 'minmax')
  with pytest.raises(InputError, match='absmax'):
    input_step(STATS.divided(jnp.ones(I)), 'mse')
  with pytest.raises(InputError, match='absmax, mse'):
    rtn(dense(W), 'w4a16', clip='l2')
  with pytest.raises(InputError, match='calibration text'):
    rtn(dense(W), 'w8a8-static')
  with pytest.raises(InputError, match='groups of 64 inputs, and the weight has 24'):
    rtn(dense(W), 'w4a16-g64')
  with pytest.raises(InputError, match='damping'):
    methods.bound('gptq', dict(spec='w4a16', damp=.1))
  with pytest.raises(InputError, match='calibration=TEXT'):
    methods.apply({}, (dict(where='.*', method='gptq', spec='w4a16'),))
