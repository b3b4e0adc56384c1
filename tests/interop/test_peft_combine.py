"""Adapters combined: what `add_weighted_adapter` of the PEFT library makes of them."""
import numpy as np
import pytest

import lean_jax as lean
from lean_jax.adapters import combine
from tests.adapters.stirring import stirred
from tests.interop import rounding

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

HOW = dict(where='layers/.*/(q|down)/kernel', rank=4)
KINDS = {'cat': {}, 'linear': {}, 'svd': dict(rank=3)} | {
    name + end: dict(density=.4) for name in ('magnitude_prune', 'ties', 'dare_linear', 'dare_ties')
    for end in ('', '_svd')}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp('combine') / 'base'
  lean.save(rounding.floats('llama'), folder, format='hf')
  return folder, lean.load(folder)


@pytest.fixture(scope='module')
def adapted(base):
  _, model = base
  return dict(one=stirred(lean.attach_lora(model, alpha=6., **HOW), .2),
              two=stirred(lean.attach_lora(model, alpha=3., seed=1, **HOW), .3))


@pytest.fixture(scope='module')
def theirs(base, adapted, tmp_path_factory):
  folder, _ = base
  model, path = None, tmp_path_factory.mktemp('adapters')
  for name, ours in adapted.items():
    lean.save_adapter(ours, path / name)
    if model is None:
      plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
      model = peft.PeftModel.from_pretrained(plain, path / name, adapter_name=name)
    else:
      model.load_adapter(path / name, name)
  return model.eval()


def by_value(x, density, floor):
  """What is kept, by the numbers themselves, so that it is the same there and here."""
  return x * (abs(x) * 1e4 - floor(abs(x) * 1e4) < density) / density


@pytest.mark.parametrize('kind', [pytest.param(kind, marks=[] if kind in (
    'svd', 'ties', 'dare_linear') else pytest.mark.slow) for kind in KINDS])
@pytest.mark.parametrize('weights', [[.7, .4], pytest.param([1.2, -.5], marks=pytest.mark.slow)])
def test_it_is_the_weighted_adapter_of_peft(adapted, theirs, monkeypatch, kind, weights):
  if kind.startswith('dare'):
    exact = not kind.endswith('svd')                   # differences are rounded otherwise there
    mask = by_value if exact else lambda x, density, floor: x
    monkeypatch.setattr(combine, 'dropped', lambda x, density, key: mask(x, density, np.floor))
    monkeypatch.setattr(peft.utils.merge_utils, 'random_pruning',
                        lambda x, density, rescale: mask(x, density, torch.floor))
  settings = dict(KINDS[kind])
  made = lean.combine(adapted, kind, weights=weights, **settings)
  name = f'{kind}{weights}'.replace('.', '')
  more = dict(svd_rank=settings.pop('rank')) if 'rank' in settings else {}
  theirs.add_weighted_adapter(['one', 'two'], weights, name, combination_type=kind, **settings,
                              **more)
  modules = dict(theirs.base_model.model.named_modules())
  for ours, their in (('attention/q', 'self_attn.q_proj'), ('mlp/down', 'mlp.down_proj')):
    part, leaf = ours.split('/')
    w = made.params['layers'][part][leaf]['kernel']
    for k in range(2):
      with torch.no_grad():
        want = modules[f'model.layers.{k}.{their}'].get_delta_weight(name).numpy().T
      got = np.asarray(w.a[k] @ w.b[k]) * w.scale
      # float32, and singular vectors of an SVD of its own
      np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max())
