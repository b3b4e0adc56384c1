"""A folder as the hub has GPT-2's: no prefix, causal masks as tensors, its real tokenizer."""
import json

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import lean_jax as lean

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')


@pytest.fixture
def hub_folder(real_data, tmp_path):
  """(the model of transformers, the folder)."""
  files = real_data / 'tokenizers' / 'gpt2'
  rules = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
      str(files / 'vocab.json'), str(files / 'merges.txt')))
  rules.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rules.decoder = tokenizers.decoders.ByteLevel()
  rules.add_special_tokens(['<|endoftext|>'])
  torch.manual_seed(0)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=.3)).eval()
  model.save_pretrained(tmp_path)
  rules.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(model_max_length=32)))
  path = tmp_path / 'model.safetensors'
  tensors = {name.removeprefix('transformer.'): x
             for name, x in safetensors.numpy.load_file(path).items()}
  for k in range(2):
    tensors[f'h.{k}.attn.bias'] = np.tril(np.ones((1, 1, 32, 32), np.float32))
    tensors[f'h.{k}.attn.masked_bias'] = np.array(-1e4, np.float32)
  safetensors.numpy.save_file(tensors, path, metadata=dict(format='pt'))
  return model, tmp_path


@pytest.mark.filterwarnings('ignore')             # transformers' own
def test_a_folder_of_the_hub_writes_what_transformers_writes(hub_folder):
  theirs, folder = hub_folder
  model = lean.load(folder)
  prompt = 'Once upon a time, in naïve Zürich'
  ids = model.tokenizer.encode(prompt)
  assert model.tokenizer.size == 50257
  assert ids[:4].tolist() == [7454, 2402, 257, 640]
  assert model.tokenizer.decode(ids) == prompt
  start = transformers.AutoTokenizer.from_pretrained(folder)(prompt, return_tensors='pt').input_ids
  new = theirs.generate(start, max_new_tokens=12, do_sample=False, pad_token_id=50256)[0]
  assert model.generate(prompt, tokens=12) == model.tokenizer.decode(new.numpy())


def test_tensors_that_are_no_parameters_of_gpt2_are_named(hub_folder):
  _, folder = hub_folder
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path) | {'h.0.attn.odd': np.zeros(2, np.float32)}
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(lean.InputError, match=r'unknown h\.0\.attn\.odd;'):
    lean.load(folder)
