"""Adapters of products that a checkpoint has fused, and of experts, in the PEFT library's files."""
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax import tree
from lean_jax.adapters import peft as peft_files
from lean_jax.weights import Magnitude
from tests.adapters.stirring import stirred
from tests.interop import rounding
from tests.interop.bases import bases
from tests.interop.original import close, logits, theirs

torch = pytest.importorskip('torch')
peft = pytest.importorskip('peft')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

QKV = 'layers/attention/(q|k|v)/kernel'
LORA = dict(rank=2, alpha=6.)
JAMBA = dict(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
             expert_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_dt_rank=4)
ATTENTION, EXPERTS = 'layers/attention/(q|v)/kernel', 'layers/moe/experts/.*'
CHANGES = dict(jamba=JAMBA, mixtral=dict(num_local_experts=3, num_experts_per_tok=2),
               qwen3_moe=dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32,
                              head_dim=32))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The function from a family to the folder of a tiny random model."""
  return bases(tmp_path_factory, CHANGES)


def attached(model, method, where, **settings):
  return stirred(lean.attach(model, method, where=where, **settings), .2)


def check_saved(folder, base, model, out):
  """PEFT's logits of what we save, and ours of it, are those of the model."""
  lean.save_adapter(model, out)
  ours = np.asarray(model.logits(rounding.IDS))
  assert np.abs(ours - np.asarray(base.logits(rounding.IDS))).max() > .02 * np.abs(ours).max()
  close(logits(peft.PeftModel.from_pretrained(theirs(folder), out).eval()), ours)
  close(np.asarray(lean.load_adapter(base, out).logits(rounding.IDS)), ours)
  return json.loads((out / 'adapter_config.json').read_text())


CASES = dict(
    lora=('gpt2', dict(method='lora', where=QKV + '|layers/mlp/up/kernel', rank=2, alpha=6.,
                       rules=[('.*/k/.*', dict(rank=3)), ('.*/v/.*', dict(alpha=1.))])),
    some=('gpt2', dict(method='lora', where='layers/attention/(k|o)/kernel', rank=2, alpha=6.)),
    dora=('gpt2', dict(method='dora', where=QKV, rank=2, alpha=6.)),
    ia3=('phi3', dict(method='ia3', where=None)),
    biased=('gpt2', dict(method='ia3', where=QKV, side='outputs')),
    interleaved=('gpt_neox', dict(method='lora', where=QKV, rank=2, alpha=6.)),
    phi3=('phi3', dict(method='lora', where='layers/.*', rank=2, alpha=6.)))


@pytest.mark.parametrize('case', [pytest.param(k, marks=[] if k in ('lora', 'biased') else [
    pytest.mark.slow]) for k in CASES])
def test_what_we_save_of_a_fused_product_peft_loads_with_the_same_logits(folders, tmp_path, case):
  family, settings = CASES[case]
  base = lean.load(folders(family))
  found = check_saved(folders(family), base, attached(base, **settings), tmp_path / 'a')
  if case == 'lora':                                   # 2 + 3 + 2, and scales of 3, 2 and 1/2
    assert {found['r'], *found['rank_pattern'].values()} == {2, 7}


def test_weights_that_share_an_a_are_written_with_its_rank(folders, tmp_path):
  base = lean.load(folders('gpt2'))
  model = attached(base, 'lora', QKV, rank=2, alpha=6.)
  a = model.params['layers']['attention']['q']['kernel'].a
  shared = dataclasses.replace(model, params=tree.transform(
      model.params, [(QKV, lambda w: dataclasses.replace(w, a=a))]))
  found = check_saved(folders('gpt2'), base, shared, tmp_path / 'a')
  assert found['r'] == 2
  again = lean.load_adapter(base, tmp_path / 'a').params['layers']['attention']
  for name in 'qkv':
    own = shared.params['layers']['attention'][name]['kernel']
    np.testing.assert_array_equal(again[name]['kernel'].b, own.b)


THEIRS = dict(
    lora=('gpt2', lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=['c_attn', 'c_proj'])),
    rslora=('gpt2', lambda: peft.LoraConfig(r=4, target_modules=['c_attn'], use_rslora=True)),
    dora=('gpt2', lambda: peft.LoraConfig(r=4, target_modules=['c_attn'], use_dora=True)),
    ia3=('phi3', lambda: peft.IA3Config(target_modules=['qkv_proj', 'down_proj'],
                                        feedforward_modules=['down_proj'])),
    biased=('gpt2', lambda: peft.IA3Config(target_modules=['c_attn', 'mlp.c_proj'],
                                           feedforward_modules=['mlp.c_proj'])),
    vera=('gpt2', lambda: peft.VeraConfig(r=4, target_modules=['c_attn', 'c_fc'])),
    interleaved=('gpt_neox', lambda: peft.LoraConfig(r=4, target_modules=['query_key_value'])),
    phi3=('phi3', lambda: peft.LoraConfig(r=4, target_modules=['qkv_proj', 'gate_up_proj'])),
    experts=('mixtral', lambda: peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=['q_proj'], rank_pattern={r'.*\.down_proj': 3},
        alpha_pattern={r'experts\.down_proj': 5},
        target_parameters=['experts.gate_up_proj', 'experts.down_proj'])),
    down=('mixtral', lambda: peft.LoraConfig(r=2, target_modules=[],
                                             target_parameters=['experts.down_proj'])),
    up=('mixtral', lambda: peft.LoraConfig(r=2, target_modules=[],
                                           target_parameters=['gate_up_proj'])),
    qwen=('qwen3_moe', lambda: peft.LoraConfig(
        r=2, target_modules=[], target_parameters=['gate_up_proj', 'down_proj'])))


@pytest.mark.parametrize('case', [pytest.param(k, marks=[] if k in (
    'lora', 'biased', 'vera', 'experts') else [pytest.mark.slow]) for k in THEIRS])
def test_what_peft_saves_of_the_whole_we_load_with_the_same_logits(folders, tmp_path, case):
  torch.manual_seed(0)
  family, config = THEIRS[case]
  model = peft.get_peft_model(theirs(folders(family)), config()).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.add_(.2 * torch.randn_like(p))
  model.save_pretrained(tmp_path)
  want, base = logits(model), lean.load(folders(family))
  assert np.abs(want - np.asarray(base.logits(rounding.IDS))).max() > .02 * np.abs(want).max()
  loaded = lean.load_adapter(base, tmp_path)
  close(np.asarray(loaded.logits(rounding.IDS)), want)
  if case in ('vera', 'biased'):
    check_saved(folders(family), base, loaded, tmp_path / 'again')


EXPERT_CASES = dict(
    mixtral=dict(where=f'{ATTENTION}|{EXPERTS}', rules=[('.*/q/.*', dict(rank=3))], dropout=.1),
    down=dict(where='.*/experts/(gate|down)/.*', rules=[('.*/down/.*', dict(rank=1, alpha=1.))]),
    jamba=dict(where='.*/experts/.*|.*/out/.*'), qwen3_moe=dict(where=EXPERTS))


@pytest.mark.parametrize('case', ['mixtral', *(pytest.param(k, marks=pytest.mark.slow)
                                               for k in ('down', 'jamba', 'qwen3_moe'))])
def test_experts_adapters_are_peft_s_own(folders, tmp_path, case):
  folder = folders('mixtral' if case == 'down' else case)
  base = lean.load(folder)
  model = attached(base, 'lora', rank=2, alpha=6., **EXPERT_CASES[case])
  found = check_saved(folder, base, model, tmp_path / 'a')
  assert found['lora_dropout'] == 0 and found['target_parameters']
  again = lean.load_adapter(base, tmp_path / 'a')
  lean.save_adapter(again, tmp_path / 'b')             # of the same ranks
  sizes = [{n: x.shape for n, x in safetensors.numpy.load_file(
      tmp_path / name / 'adapter_model.safetensors').items()} for name in 'ab']
  assert sizes[0] == sizes[1]


def test_experts_that_peft_cannot_load_are_refused(folders, tmp_path):
  base = lean.load(folders('mixtral'))
  with pytest.raises(lean.InputError, match='LoRA of experts alone.*Scaled'):
    lean.save_adapter(lean.attach(base, 'ia3', where=EXPERTS, side='inputs'), tmp_path / 'a')
  both = lean.attach(lean.attach(base, 'dora', where=ATTENTION, **LORA), 'lora', where=EXPERTS,
                     **LORA)
  with pytest.raises(lean.InputError, match='of LoRA or of DoRA'):
    lean.save_adapter(both, tmp_path / 'a')
  assert not (tmp_path / 'a').exists()
  odd = lean.attach(base, 'vera', where=EXPERTS, rank=2)
  assert 'LoRA of experts alone' in peft_files.refusal(odd.family, odd.config, odd.params)


def test_parts_that_the_files_cannot_have_together_are_refused(folders, tmp_path):
  base = lean.load(folders('gpt2'))
  save = lambda model: lean.save_adapter(model, tmp_path / 'a')
  with pytest.raises(lean.InputError, match=r'c_attn is 3 weights here, and 1 of them'):
    save(lean.attach(base, 'dora', where='layers/attention/q/kernel', **LORA))
  with pytest.raises(lean.InputError, match='one d of the whole, where these differ'):
    save(attached(base, 'vera', QKV, rank=2))
  begun = lean.attach(base, 'vera', where='layers/.*', rank=2)
  assert 'are not those of the others' in peft_files.refusal(
      begun.family, begun.config, begun.params)
  with pytest.raises(lean.InputError, match='other dropouts each'):
    save(lean.attach(base, 'lora', where=QKV, rules=[('.*/q/.*', dict(dropout=.1))], **LORA))
  inputs = lean.attach(base, 'ia3', where=QKV, side='inputs')
  save(inputs)
  moved = tree.transform(inputs.params, [('.*/q/.*', lambda w: dataclasses.replace(
      w, by=w.by * jnp.float32(2)))])
  with pytest.raises(lean.InputError, match='scale them otherwise each'):
    lean.save_adapter(dataclasses.replace(inputs, params=moved), tmp_path / 'b')
  mixed = tree.transform(lean.attach(base, 'dora', where=QKV, **LORA).params, [
      ('.*/q/.*', lambda w: w.base if isinstance(w, Magnitude) else w)])
  with pytest.raises(lean.InputError, match='several kinds'):
    lean.save_adapter(dataclasses.replace(base, params=mixed), tmp_path / 'b')


def test_tensors_of_the_whole_that_do_not_fit_are_refused(folders, tmp_path):
  base = lean.load(folders('gpt2'))
  lean.save_adapter(lean.attach(base, 'lora', where=QKV, **LORA), tmp_path / 'a')
  file = tmp_path / 'a' / 'adapter_model.safetensors'
  found = {n: x[:-1] if 'lora_B' in n else x for n, x in safetensors.numpy.load_file(file).items()}
  safetensors.numpy.save_file(found, file)
  with pytest.raises(lean.InputError, match='do not fit'):
    lean.load_adapter(base, tmp_path / 'a')
  path = tmp_path / 'a' / 'adapter_config.json'
  given = json.loads(path.read_text())
  path.write_text(json.dumps(given | dict(target_parameters=['gate.weight'])))
  with pytest.raises(lean.InputError, match='gate.weight; .* not of their router'):
    lean.load_adapter(base, tmp_path / 'a')
