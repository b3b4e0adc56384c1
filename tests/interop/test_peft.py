"""Adapters in the PEFT library's files: the same logits there and here."""
import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax import tree
from lean_jax.weights import Magnitude, Scaled
from tests.adapters.stirring import stirred
from tests.interop import rounding
from tests.interop.original import close, logits, theirs

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

OURS = dict(
    lora=dict(rank=4, alpha=8., rules=[('.*/down/.*', dict(rank=3)), ('head/.*', dict(alpha=2.)),
                                       ('embed/.*', dict(rank=2))]),
    rslora=dict(method='lora', rank=4, alpha=8., scaling='rank_stabilised', dropout=.1,
                where='layers/.*/(q|down)/kernel'),
    dora=dict(rank=4, alpha=8., where='layers/.*/(q|k|down)/kernel'),
    vera=dict(rank=4, where='layers/.*/(q|k|down)/kernel'), ia3={})
LORA = dict(r=4, lora_alpha=6, target_modules=['q_proj', 'k_proj', 'down_proj'])
THEIRS = dict(
    lora=lambda: peft.LoraConfig(**LORA, rank_pattern=dict(down_proj=3),
                                 alpha_pattern={'mlp.down_proj': 5}, lora_dropout=.1),
    embedding=lambda: peft.LoraConfig(r=4, target_modules=['embed_tokens', 'lm_head']),
    rslora=lambda: peft.LoraConfig(**LORA, use_rslora=True),
    dora=lambda: peft.LoraConfig(**LORA, use_dora=True),
    vera=lambda: peft.VeraConfig(r=4, target_modules=LORA['target_modules']),
    ia3=lambda: peft.IA3Config(target_modules=['k_proj', 'v_proj', 'down_proj'],
                               feedforward_modules=['down_proj']))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Of a tiny random Llama, its embeddings and its head about 0, so that logits are."""
  out = tmp_path_factory.mktemp('peft') / 'base'
  model = rounding.floats('llama')
  centre = lambda w: dataclasses.replace(w, value=w.value - 1)
  lean.save(dataclasses.replace(model, params=tree.transform(
      model.params, [('(embed|head)/.*', centre)])), out, format='hf')
  return out


@pytest.fixture(scope='module')
def base(folder):
  return lean.load(folder)


def attached(model, name):
  settings = dict(OURS[name])
  where = settings.pop('where', '.*/kernel' if name == 'lora' else None)
  return stirred(lean.attach(model, settings.pop('method', name), where=where, **settings), .2)


@pytest.mark.parametrize('name', OURS)
def test_what_we_save_peft_loads_with_the_same_logits(folder, base, tmp_path, name):
  model = attached(base, name)
  lean.save_adapter(model, tmp_path / 'adapter')
  ours = np.asarray(model.logits(rounding.IDS))
  assert np.abs(ours - np.asarray(base.logits(rounding.IDS))).max() > .05 * np.abs(ours).max()
  close(logits(peft.PeftModel.from_pretrained(theirs(folder), tmp_path / 'adapter').eval()), ours)
  again = lean.load_adapter(base, tmp_path / 'adapter')
  np.testing.assert_allclose(again.logits(rounding.IDS), ours, atol=1e-6 * np.abs(ours).max())
  assert jax.tree.structure(again.params) == jax.tree.structure(model.params) or name == 'rslora'
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again.params),
               jax.tree.leaves(model.params))


@pytest.mark.parametrize('name', THEIRS)
def test_what_peft_saves_we_load_with_the_same_logits(folder, base, tmp_path, name):
  torch.manual_seed(0)
  model = peft.get_peft_model(theirs(folder), THEIRS[name]()).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.add_(.2 * torch.randn_like(p))
  model.save_pretrained(tmp_path)
  want = logits(model)
  assert np.abs(want - np.asarray(base.logits(rounding.IDS))).max() > .05 * np.abs(want).max()
  close(np.asarray(lean.load_adapter(base, tmp_path).logits(rounding.IDS)), want)


def test_an_adapter_belongs_to_its_base_stacked_or_not(base, tmp_path):
  small = lean.quantize(base, 'w4a16-g32')
  model = attached(small, 'ia3')
  lean.save_adapter(model, tmp_path / 'a')
  unrolled = lean.load_adapter(lean.scan_layers(small, False), tmp_path / 'a')
  np.testing.assert_allclose(unrolled.logits(rounding.IDS), model.logits(rounding.IDS), atol=1e-4)
  with pytest.raises(lean.InputError, match='fingerprint'):
    lean.load_adapter(base, tmp_path / 'a')
  with pytest.raises(lean.InputError, match='already'):
    lean.load_adapter(model, tmp_path / 'a')
  with pytest.raises(lean.InputError, match='is there already'):
    lean.save_adapter(model, tmp_path / 'a')
  lean.save_adapter(model, tmp_path / 'a', overwrite=True)
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'mine.txt').write_text('mine')
  with pytest.raises(lean.InputError, match='holds no adapter'):
    lean.save_adapter(model, tmp_path / 'b', overwrite=True)


def test_layers_that_differ_are_loaded_unrolled(folder, base, tmp_path):
  torch.manual_seed(0)
  config = peft.LoraConfig(r=4, target_modules=['q_proj'], layers_to_transform=[1],
                           init_lora_weights=False)
  model = peft.get_peft_model(theirs(folder), config).eval()
  model.save_pretrained(tmp_path)
  # its init is of the first load alone; what is saved is all that counts
  with pytest.raises(lean.InputError, match='scan_layers=False'):
    lean.load_adapter(base, tmp_path)
  made = lean.load_adapter(lean.scan_layers(base, False), tmp_path)
  close(np.asarray(made.logits(rounding.IDS)), logits(model))


def changed(folder, config=None, edit=None):
  path = folder / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
  if edit:
    file = folder / 'adapter_model.safetensors'
    safetensors.numpy.save_file(edit(safetensors.numpy.load_file(file)), file)


@pytest.mark.parametrize(('config', 'edit', 'said'), [
    (dict(peft_type='LOHA'), None, 'LORA, IA3, VERA'), (dict(bias='all'), None, "bias = 'all'"),
    (dict(init_lora_weights='pissa'), None, 'pissa'),
    (None, lambda t: {k.replace('q_proj', 'r_proj'): x for k, x in t.items()}, 'r_proj'),
    (None, lambda t: {k: x[:, :-1] if 'lora_A' in k else x for k, x in t.items()}, 'do not fit'),
    (None, lambda t: {k: x for k, x in t.items() if 'lora_B' not in k}, 'do not fit'),
    (None, lambda t: {k: x.astype(np.int32) for k, x in t.items()}, 'no floats')])
def test_files_that_do_not_fit_are_refused(base, tmp_path, config, edit, said):
  lean.save_adapter(attached(base, 'rslora'), tmp_path / 'a')
  changed(tmp_path / 'a', config, edit)
  with pytest.raises(lean.InputError, match=said):
    lean.load_adapter(base, tmp_path / 'a')


def test_what_the_files_have_no_words_for_is_refused(base, tmp_path):
  with pytest.raises(lean.InputError, match='attach and train'):
    lean.save_adapter(base, tmp_path / 'a')
  twice = attached(attached(base, 'rslora'), 'ia3')
  with pytest.raises(lean.InputError, match='one kind'):
    lean.save_adapter(twice, tmp_path / 'a')
  tied = lean.attach_lora(rounding.floats('llama', tie_word_embeddings=True), rank=2,
                          where='embed/.*')
  with pytest.raises(lean.InputError, match='head'):
    lean.save_adapter(tied, tmp_path / 'a')
  assert not (tmp_path / 'a').exists()


def test_kinds_come_back(base, tmp_path):
  for name, kind, path in (('dora', Magnitude, 'attention/q'), ('ia3', Scaled, 'mlp/down')):
    lean.save_adapter(attached(base, name), tmp_path / name)
    found = tree.named_weights(lean.load_adapter(base, tmp_path / name).params)
    assert isinstance(found[f'layers/{path}/kernel'], kind)
