"""What a run says of its speed, and the trace of some of its steps."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax import methods, tree
from lean_jax.errors import InputError
from lean_jax.models.decoder import DecoderConfig
from lean_jax.training import rates
from lean_jax.training.metrics import Metrics
from lean_jax.training.profile import Profile, steps_of
from lean_jax.training.rates import Rates, step_flops

CONFIG = DecoderConfig(vocabulary=32, width=16, layers=2, heads=2, groups=1, head_width=8,
                       hidden=32, context=16, tied=False)


def shapes(config, steps=()):
  def made():
    params = config.module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
    return methods.apply(params, steps, jax.random.key(1)) if steps else params
  return jax.eval_shape(made)


def test_operations_are_those_of_the_products():
  params, tokens = shapes(CONFIG), 3 * 16
  # a layer's q, k, v, o, gate, up, down; the head; attention: 4 T of 2 heads of 8 in 2 layers
  weights = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32) + 16 * 32
  attention = 4 * 16 * 16 * 2
  train, _ = tree.split(params, '.*')
  assert step_flops(CONFIG, params, train, [], 3, 16) == tokens * (6 * weights + 3 * attention)
  frozen = step_flops(CONFIG, params, train, [(CONFIG, params)], 3, 16)
  assert frozen == tokens * (8 * weights + 4 * attention)

  adapted = shapes(CONFIG, (dict(where='layers/mlp/up/.*', method='lora', rank=2, alpha=4),))
  train, _ = tree.split(adapted, '.*/(a|b)')
  extra = 2 * (16 * 2 + 2 * 32)
  assert step_flops(CONFIG, adapted, train, [], 3, 16) == tokens * (
      4 * (weights + extra) + 2 * extra + 3 * attention)


def test_the_clock_counts_from_the_end_of_the_first_step(monkeypatch):
  now = [100.]
  monkeypatch.setattr(rates.time, 'monotonic', lambda: now[0])
  peak = 1e6
  monkeypatch.setitem(rates.PEAKS, jax.local_devices()[0].device_kind, peak)
  r = Rates(steps=20, tokens=64, flops=3e6, devices=2)
  r.begin(1)
  now[0] += 8
  r.begin(5)
  assert r(5) == dict(tokens_per_second=32., seconds_left=30., mfu=.75)
  now[0] += 1
  assert r(6)['tokens_per_second'] == 64


def test_metrics_have_rates_and_null_for_what_is_not_finite(tmp_path):
  with Metrics(tmp_path, every=2, rates=Rates(6, 64)) as hook:
    for step in range(1, 5):
      hook(step, dict(loss=jnp.nan if step == 4 else 1.))
  found = [json.loads(x, parse_constant=pytest.fail)
           for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [x['step'] for x in found] == [2, 4] and found[1]['loss'] is None
  assert all(x['tokens_per_second'] > 0 and x['seconds_left'] > 0 for x in found)


def test_a_profile_has_its_steps(tmp_path):
  double = jax.jit(lambda x: x * 2)
  with Profile(tmp_path, 3, 4) as hook:
    for step in range(1, 7):
      hook(step, dict(loss=double(np.float32(step))))
      assert bool(list(tmp_path.rglob('*.xplane.pb'))) == (step >= 4)


@pytest.mark.parametrize('text', ['10', '5:3', '0:3', '1:3', 'a:b', '-1:2'])
def test_a_profile_that_is_no_range(text):
  with pytest.raises(InputError, match='expected FIRST:LAST'):
    steps_of(text)
