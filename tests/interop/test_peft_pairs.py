"""Adapters of encoder-decoders in the PEFT library's files: the same logits there and here."""
import json

import numpy as np
import pytest

import lean_jax as lean
from tests.adapters.stirring import stirred
from tests.interop.bases import words
from tests.interop.original import close

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

SIZES = dict(
    t5=dict(vocab_size=40, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2,
            decoder_start_token_id=0, relative_attention_num_buckets=8,
            relative_attention_max_distance=20),
    bart=dict(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, init_std=.3,
              encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
              decoder_ffn_dim=20, max_position_embeddings=32, scale_embedding=True))
SOURCE, TARGET = np.arange(3, 21).reshape(2, 9), np.arange(5, 13).reshape(2, 4)
MASK = np.arange(9)[None] < np.array([[9], [6]])
OURS = dict(prefix=dict(tokens=3, hidden=8), p_tuning_v2=dict(tokens=3), prompt=dict(tokens=3),
            lora=dict(rank=2, alpha=8.))
TASK = dict(task_type='SEQ_2_SEQ_LM')
THEIRS = dict(
    prefix=lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True,
                                           encoder_hidden_size=8, **TASK),
    p_tuning_v2=lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    prompt=lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    p_tuning=lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    lora=lambda: peft.LoraConfig(r=2, target_modules=r'.*\.(q|v|wo|q_proj|fc2)', **TASK))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The function from a family to the folder of a tiny random model."""
  made = {}

  def one(family):
    if family not in made:
      made[family] = tmp_path_factory.mktemp('bases') / family
      torch.manual_seed(0)
      config = transformers.AutoConfig.for_model(family, **SIZES[family])
      transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(made[family])
      words(made[family])
    return made[family]
  return one


def theirs(folder):
  return transformers.AutoModelForSeq2SeqLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager').eval()


def their_logits(model):
  with torch.no_grad():
    return model(input_ids=torch.tensor(SOURCE), attention_mask=torch.tensor(MASK.astype(np.int64)),
                 decoder_input_ids=torch.tensor(TARGET)).logits.numpy()


def our_logits(model):
  return np.asarray(model.logits(SOURCE, MASK, decoder_tokens=TARGET))


def cases(methods, *default):
  return [pytest.param(family, method, marks=[] if (family, method) in default else [
      pytest.mark.slow]) for family in SIZES for method in methods]


@pytest.mark.parametrize(('family', 'method'), cases(
    OURS, ('t5', 'prefix'), ('t5', 'prompt'), ('t5', 'lora')))
def test_what_we_save_peft_loads_with_the_same_logits(folders, tmp_path, family, method):
  base = lean.load(folders(family))
  model = stirred(lean.attach(base, method, **OURS[method]), 1.)
  lean.save_adapter(model, tmp_path / 'adapter')
  ours = our_logits(model)
  assert np.abs(ours - our_logits(base)).max() > .02 * np.abs(ours).max()
  there = peft.PeftModel.from_pretrained(theirs(folders(family)), tmp_path / 'adapter').eval()
  close(their_logits(there), ours, 4e-5)
  again = lean.load_adapter(base, tmp_path / 'adapter')
  np.testing.assert_allclose(our_logits(again), ours, atol=1e-6 * np.abs(ours).max())


def test_a_prefix_for_one_stack_is_refused(folders, tmp_path):
  base = lean.load(folders('t5'))
  lean.save_adapter(lean.attach(base, 'p_tuning_v2', tokens=3), tmp_path / 'a')
  path = tmp_path / 'a' / 'adapter_config.json'
  given = json.loads(path.read_text())
  for change, said in ((dict(num_transformer_submodules=1), 'a prefix of one stack'),
                       (dict(num_layers=None), 'num_layers None'),
                       (dict(num_layers=2), r'\(3, 64\)')):
    path.write_text(json.dumps(given | change))
    with pytest.raises(lean.InputError, match=said):
      lean.load_adapter(base, tmp_path / 'a')


@pytest.mark.parametrize(('family', 'method'), cases(
    THEIRS, ('t5', 'p_tuning_v2'), ('t5', 'p_tuning')))
def test_what_peft_saves_we_load_with_the_same_logits(folders, tmp_path, family, method):
  torch.manual_seed(0)
  model = peft.get_peft_model(theirs(folders(family)), THEIRS[method]()).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.add_(.5 * torch.randn_like(p))
  model.save_pretrained(tmp_path)
  want, base = their_logits(model), lean.load(folders(family))
  assert np.abs(want - our_logits(base)).max() > .02 * np.abs(want).max()
  close(our_logits(lean.load_adapter(base, tmp_path)), want, 4e-5)
