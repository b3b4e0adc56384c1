"""Many adapters over one base: switched without compiling, and one for each row of a batch."""
import dataclasses

import jax
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.weights import Dense, LowRank

TOKENS = np.arange(36).reshape(3, 12)


def moved(model, seed):
  """The model with adapters away from their start."""
  rng = np.random.default_rng(seed)

  def one(w):
    b = np.asarray(.2 * rng.normal(size=w.b.shape), np.float32)
    return dataclasses.replace(w, b=b)
  return dataclasses.replace(model, params=jax.tree.map(
      lambda w: one(w) if isinstance(w, LowRank) else w, model.params, is_leaf=tree.is_weight))


@pytest.fixture(scope='module')
def base(tiny_model):
  return lean.quantize(tiny_model, 'w4a16-g16')


@pytest.fixture(scope='module')
def adapted(base):
  attach = lambda seed, **how: moved(lean.attach_lora(base, seed=seed, **how), seed)
  return dict(one=attach(1, rank=2, where='(layers|embed|head)/.*'), two=attach(2, rank=5,
              where='layers/mlp/.*'))


@pytest.fixture(scope='module')
def whole(adapted):
  return lean.together(adapted)


def near(got, want):
  # float32, sums in another order
  np.testing.assert_allclose(got, want, atol=2e-5 * float(np.abs(want).max()))


def test_each_is_as_it_was_alone_and_a_switch_compiles_nothing(base, adapted, whole):
  traced = []

  @jax.jit
  def run(params):
    traced.append(1)
    return base.module.apply({'params': params}, TOKENS)[0]
  plain = np.asarray(base.logits(TOKENS))
  for name, model in dict(adapted, nobody=base).items():
    want = np.asarray(model.logits(TOKENS))
    near(run(lean.use(whole, None if name == 'nobody' else name).params), want)
    assert name == 'nobody' or np.abs(want - plain).max() > .1 * np.abs(plain).max()
  assert len(traced) == 1
  own = sum(x.size * 4 for n, x in tree.named_arrays(whole.params).items()
            if n.endswith(('/a', '/b', '/rows')))
  assert tree.nbytes(whole.params) == tree.nbytes(base.params) + own
  there = {id(x) for x in jax.tree.leaves(whole.params)}
  assert all(id(x) in there for x in jax.tree.leaves(base.params))


def test_each_row_of_a_batch_has_its_own(base, adapted, whole):
  mixed = lean.use(whole, ['two', None, 'one'])
  want = [np.asarray(m.logits(TOKENS))[k] for k, m in enumerate(
      (adapted['two'], base, adapted['one']))]
  near(mixed.logits(TOKENS), np.stack(want))
  near(mixed.logits(np.repeat(TOKENS, 2, axis=0)), np.repeat(np.stack(want), 2, axis=0))
  unrolled = lean.scan_layers(mixed, False)
  near(unrolled.logits(TOKENS), np.stack(want))
  with pytest.raises(lean.InputError, match='3 adapters .* 2 rows'):
    mixed.logits(TOKENS[:2])
  with pytest.raises(lean.InputError, match='use one for all'):
    lean.merge(mixed)


def test_the_one_in_use_is_merged_and_all_are_saved(adapted, whole, tmp_path):
  two = lean.use(whole, 'two')
  want = np.asarray(adapted['two'].logits(TOKENS))
  merged = lean.merge(two)
  assert isinstance(merged.params['layers']['mlp']['up']['kernel'], Dense)
  near(merged.logits(TOKENS), want)
  lean.save(two, tmp_path / 'all')
  near(lean.use(lean.load(tmp_path / 'all'), 'one').logits(TOKENS),
       np.asarray(adapted['one'].logits(TOKENS)))


def test_what_does_not_go_together_is_refused(tiny_model, base, adapted, whole):
  with pytest.raises(lean.InputError, match='no adapters'):
    lean.together({})
  with pytest.raises(lean.InputError, match='same base'):
    lean.together(dict(adapted, other=lean.attach_lora(tiny_model, rank=2)))
  with pytest.raises(lean.InputError, match='other than LoRA'):
    lean.together(dict(adapted, other=lean.attach(base, 'ia3')))
  with pytest.raises(lean.InputError, match='there are: one, two'):
    lean.use(whole, 'three')
  with pytest.raises(lean.InputError, match='put some together'):
    lean.use(base, 'one')
