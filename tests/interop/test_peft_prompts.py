"""Prefixes and prompts in the PEFT library's files, and bottlenecks against hooks in PyTorch."""
import json

import numpy as np
import pytest

import lean_jax as lean
from lean_jax.weights.beside import Prefix, Prompt
from tests.adapters.stirring import stirred
from tests.interop import rounding
from tests.interop.bases import bases
from tests.interop.original import close, logits, theirs

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

BEFORE = dict(prefix=dict(tokens=3, hidden=8), p_tuning_v2=dict(tokens=3), prompt=dict(tokens=3))
THEIRS = dict(
    prefix=lambda: peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3,
                                           prefix_projection=True, encoder_hidden_size=8),
    p_tuning_v2=lambda: peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3),
    prompt=lambda: peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3),
    p_tuning=lambda: peft.PromptEncoderConfig(task_type='CAUSAL_LM', num_virtual_tokens=3,
                                              encoder_hidden_size=8))
CHANGES = dict(gemma2=dict(head_dim=32, sliding_window=6, tie_word_embeddings=True))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The function from a family to the folder of a tiny random model."""
  return bases(tmp_path_factory, CHANGES)


def cases(*default):
  return [pytest.param(family, method, marks=[] if (family, method) in default else [
      pytest.mark.slow]) for family in ('llama', 'gpt2', 'gemma2') for method in BEFORE]


@pytest.mark.parametrize(('family', 'method'), cases(('llama', 'prefix'), ('gpt2', 'prompt')))
def test_what_we_save_peft_loads_with_the_same_logits(folders, tmp_path, family, method):
  base = lean.load(folders(family))
  model = stirred(lean.attach(base, method, **BEFORE[method]), .3)
  lean.save_adapter(model, tmp_path / 'adapter')
  ours = np.asarray(model.logits(rounding.IDS))
  assert np.abs(ours - np.asarray(base.logits(rounding.IDS))).max() > .02 * np.abs(ours).max()
  there = peft.PeftModel.from_pretrained(theirs(folders(family)), tmp_path / 'adapter').eval()
  close(logits(there)[:, 3 * (method == 'prompt'):], ours, 4e-5)
  again = lean.load_adapter(base, tmp_path / 'adapter')
  np.testing.assert_allclose(again.logits(rounding.IDS), ours, atol=1e-6 * np.abs(ours).max())
  kind = Prompt if method == 'prompt' else Prefix
  assert isinstance(again.params.get('prompt', again.params.get('prefix')), kind)


@pytest.mark.parametrize(('family', 'method'), [
    *cases(('llama', 'prompt'), ('gpt2', 'prefix')),
    pytest.param('llama', 'p_tuning', marks=pytest.mark.slow)])
def test_what_peft_saves_we_load_with_the_same_logits(folders, tmp_path, family, method):
  torch.manual_seed(0)
  model = peft.get_peft_model(theirs(folders(family)), THEIRS[method]()).eval()
  model.save_pretrained(tmp_path)
  virtual = 3 * (method in ('prompt', 'p_tuning'))       # rows of logits that are not tokens'
  want = logits(model)[:, virtual:]
  base = lean.load(folders(family))
  close(np.asarray(lean.load_adapter(base, tmp_path).logits(rounding.IDS)), want, 4e-5)


def test_files_that_do_not_fit_are_refused(folders, tmp_path):
  base = lean.load(folders('llama'))
  made = lean.attach(base, 'prompt', tokens=3)
  lean.save_adapter(made, tmp_path / 'a')
  with pytest.raises(lean.InputError, match='already'):
    lean.load_adapter(made, tmp_path / 'a')
  with pytest.raises(lean.InputError, match='fingerprint'):
    lean.load_adapter(lean.quantize(base, 'w4a16-g32'), tmp_path / 'a')
  path = tmp_path / 'a' / 'adapter_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | dict(num_virtual_tokens=4)))
  with pytest.raises(lean.InputError, match=r'a prompt of 4 for this model is .*\(4, 64\)'):
    lean.load_adapter(base, tmp_path / 'a')
  with pytest.raises(lean.InputError, match='prefix or a prompt alone'):
    lean.save_adapter(lean.attach(made, 'ia3'), tmp_path / 'b')


def hook(w, k):
  """A forward hook that is a bottleneck; of the k-th of the stacked ones."""
  down, down_bias, up, up_bias = (
      torch.tensor(np.asarray(x[k])) for x in (w.down, w.down_bias, w.up, w.up_bias))
  f = dict(gelu=torch.nn.functional.gelu, relu=torch.relu)[w.activation]

  def change(module, args, kwargs, out):
    y = out[0] if isinstance(out, tuple) else out
    z = (args[0] if args else kwargs['hidden_states']) if w.parallel else y
    y = y + w.scale * (f(z @ down + down_bias) @ up + up_bias)
    return (y, *out[1:]) if isinstance(out, tuple) else y
  return change


@pytest.mark.parametrize(('family', 'method'), [
    ('llama', 'parallel'), ('gpt2', 'houlsby'), pytest.param('llama', 'pfeiffer', marks=[
        pytest.mark.slow]), pytest.param('mixtral', 'houlsby', marks=[pytest.mark.slow])])
def test_bottlenecks_are_those_of_hooks_on_their_branches(folders, family, method):
  base = lean.load(folders(family))
  model = stirred(lean.attach(base, method, rank=4), .2)
  there = theirs(folders(family))
  layers = there.transformer.h if family == 'gpt2' else there.model.layers
  for k, layer in enumerate(layers):
    at = dict(mixer=getattr(layer, 'attn', None) or layer.self_attn,
              feed_forward=getattr(layer, 'mlp', None) or layer.block_sparse_moe)
    for branch, module in at.items():
      w = model.params['layers'].get(f'{branch}_adapter')
      if w is not None:
        module.register_forward_hook(hook(w, k), with_kwargs=True)
  ours = np.asarray(model.logits(rounding.IDS))
  assert np.abs(ours - np.asarray(base.logits(rounding.IDS))).max() > .01 * np.abs(ours).max()
  close(logits(there), ours, 4e-5)
