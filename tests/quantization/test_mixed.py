"""Bits by weight: the choice against all choices, and the costs against the model's own loss."""
import itertools

import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.errors import InputError
from lean_jax.quantization import mixed
from lean_jax.quantization.mixed import allocate_bits, budget_bytes, sensitivities

BITS = (2, 3, 4, 8)


def problem(seed, weights=6):
  """Random costs and sizes, some costs below 0 and not falling with bits: measured ones do so."""
  rng = np.random.default_rng(seed)
  rows = {f'w{k}': int(rng.integers(5, 50)) for k in range(weights)}
  sizes = {n: {f'b{b}': r * b for b in BITS} for n, r in rows.items()}
  costs = {n: {f'b{b}': float(rng.normal() * .1 + rng.uniform() * 2. ** (4 - b)) for b in BITS}
           for n in rows}
  return costs, sizes


def total(table, chosen):
  return sum(table[n][s] for n, s in chosen.items())


def best(costs, sizes, budget):
  """The least loss of all choices that fit."""
  names = list(costs)
  every = (dict(zip(names, c)) for c in itertools.product(*(costs[n] for n in names)))
  return min(total(costs, c) for c in every if total(sizes, c) <= budget)


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('part', [0., .1, .35, .8, 1.])
def test_the_choice_is_the_best_of_all(seed, part):
  costs, sizes = problem(seed)
  least, most = (sum(f(s.values()) for s in sizes.values()) for f in (min, max))
  budget = least + int(part * (most - least))
  chosen = allocate_bits(costs, sizes, budget)
  assert total(sizes, chosen) <= budget
  np.testing.assert_allclose(total(costs, chosen), best(costs, sizes, budget), atol=1e-9)


def test_with_fewer_states_the_choice_is_near_the_best_and_within_the_budget(monkeypatch):
  costs, sizes = problem(7, weights=40)
  budget = 40 * 27 * 3
  exact = total(costs, allocate_bits(costs, sizes, budget))
  monkeypatch.setattr(mixed, 'STATES', 500)
  chosen = allocate_bits(costs, sizes, budget)
  assert total(sizes, chosen) <= budget
  assert exact <= total(costs, chosen) < exact + .05


def test_a_budget_below_the_smallest_schemes_is_told_what_these_take():
  costs, sizes = problem(0)
  least = sum(min(s.values()) for s in sizes.values())
  with pytest.raises(InputError, match=f'smallest schemes take {least:,}') as error:
    allocate_bits(costs, sizes, least - 1)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('budget', ['3.2', '3.2bits', '0 bits', '-3 bits', 0, -5, None, True])
def test_a_budget_that_is_none_is_refused(budget):
  with pytest.raises(InputError, match='budget'):
    budget_bytes(budget, {}, [])


SCHEMES = ('w2a16-g16', 'w4a16-g16')
TOKENS = np.random.default_rng(0).integers(0, 280, (4, 16))


DOWN = 'layers/mlp/down/kernel'


@pytest.fixture(scope='module')
def measured(tiny_model):
  return sensitivities(tiny_model.module, tiny_model.params, TOKENS, (*SCHEMES, 'w8a8'), DOWN)


def log_probabilities(model):
  """[B T V] float64."""
  logits = np.asarray(model.logits(TOKENS), np.float64)
  return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize('scheme', ['w2a16-g16', 'w8a8'])
def test_a_cost_is_the_divergence_and_a_size_the_bytes_of_one_weight_rounded(
    tiny_model, measured, scheme):
  costs, sizes = measured
  assert set(costs) == set(sizes) == {DOWN}
  rounded = lean.quantize(tiny_model, scheme, where=DOWN)
  p, q = log_probabilities(tiny_model), log_probabilities(rounded)
  want = np.mean(np.sum(np.exp(p) * (p - q), axis=-1))
  assert want > 1e-6
  np.testing.assert_allclose(costs[DOWN][scheme], want, rtol=1e-2, atol=1e-7)
  assert sizes[DOWN][scheme] == tree.nbytes(tree.named_weights(rounded.params)[DOWN])


def test_rules_give_bits_to_the_weight_that_needs_them(tiny_model, monkeypatch):
  """Of three weights w4a16-g16 has 5 bits, w2a16-g16 3.5: in 4.1 one can have the first."""
  where, names = 'layers/mlp/.*', [f'layers/mlp/{n}/kernel' for n in ('gate', 'up', 'down')]
  costs = {n: {'w2a16-g16': 1. + 5 * (n == DOWN), 'w4a16-g16': .1} for n in names}
  sizes = {n: {s: 2 * 32 * 48 * bits // 16 for s, bits in (('w2a16-g16', 7), ('w4a16-g16', 10))}
           for n in names}
  monkeypatch.setattr(mixed, 'sensitivities', lambda *_: (costs, sizes))
  rules = lean.allocate_bits(tiny_model, TOKENS, '4.1 bits', schemes=SCHEMES, where=where)
  assert dict(rules) == {n: 'w4a16-g16' if n == DOWN else 'w2a16-g16' for n in names}
  made = tree.named_weights(lean.quantize(tiny_model, rules).params)
  held = {n: w for n, w in made.items() if n in names}
  assert {n: str(w.spec) for n, w in held.items()} == dict(rules)
  assert {n: tree.nbytes(w) for n, w in held.items()} == {n: sizes[n][s] for n, s in rules}
  assert tree.nbytes(held) * 8 <= 4.1 * 2 * 3 * 32 * 48


def test_of_the_rules_that_quantize_takes_the_first_that_matches_counts(tiny_model):
  made = tree.named_weights(lean.quantize(
      tiny_model, [('.*/mlp/down/.*', 'w8a16'), ('.*/mlp/.*', 'w4a16')]).params)
  of = lambda name: str(made[f'layers/mlp/{name}/kernel'].spec)
  assert (of('down'), of('up'), of('gate')) == ('w8a16', 'w4a16', 'w4a16')


def test_what_cannot_be_is_refused_in_one_line(tiny_model):
  for call, match in [
      (lambda: lean.allocate_bits(tiny_model, TOKENS[0]), 'tokens of shape'),
      (lambda: lean.allocate_bits(tiny_model, TOKENS, schemes=('w9',)), 'no scheme'),
      (lambda: lean.allocate_bits(tiny_model, TOKENS, where='nothing'), 'matches no weight'),
      (lambda: lean.allocate_bits(lean.quantize(tiny_model, 'w8a16'), TOKENS), 'Quantized weight'),
      (lambda: lean.quantize(tiny_model, [('.*', 'w8a16')], where='.*'), 'place of a scheme')]:
    with pytest.raises(InputError, match=match) as error:
      call()
    assert '\n' not in str(error.value)
