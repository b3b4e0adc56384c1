"""Folders of T5 and BART as the hub has them, and what transformers computes beside the logits."""
import json

import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax.data.tokenizer import load_tokenizer
from lean_jax.errors import InputError
from lean_jax.interop.hf import load_hf
from lean_jax.nn.relative import bucket
from tests.interop.bases import words

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.filterwarnings('ignore')             # transformers' own

SMALL = dict(
    t5=dict(vocab_size=40, d_model=16, d_kv=6, d_ff=20, num_layers=2, num_heads=2,
            decoder_start_token_id=0),
    bart=dict(vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, init_std=.3,
              encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
              decoder_ffn_dim=20, max_position_embeddings=32))
SOURCE, TARGET = np.arange(3, 21).reshape(2, 9), np.arange(5, 13).reshape(2, 4)


@pytest.fixture
def written(tmp_path):
  """The function (family, edit of the tensors, keys of config.json) -> (their model, folder)."""
  def write(family, edit=lambda tensors: tensors, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL[family])
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = edit(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file({k: x.copy() for k, x in tensors.items()}, path,
                                metadata=dict(format='pt'))
    config = json.loads((tmp_path / 'config.json').read_text()) | changes
    config = {k: v for k, v in config.items() if v is not ...}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    return model, tmp_path
  return write


def theirs(model):
  with torch.no_grad():
    return model(torch.tensor(SOURCE), decoder_input_ids=torch.tensor(TARGET)).logits.numpy()


def close(ours, wanted):
  # float32, as in parity.py.
  np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize('both', [True, False])
@pytest.mark.parametrize(('buckets', 'farthest'), [(32, 128), (8, 20), (20, 100), (64, 1000)])
def test_buckets_are_those_of_transformers(buckets, farthest, both):
  of = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
  distance = np.arange(-1500, 1500)
  np.testing.assert_array_equal(bucket(distance, buckets, farthest, both),
                                of(torch.tensor(-distance), both, buckets, farthest))


def test_an_old_folder_of_t5_repeats_its_table_and_has_scores_of_no_use(written):
  def old(tensors):
    table = tensors['shared.weight']
    unused = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
    return tensors | {'encoder.embed_tokens.weight': table, 'decoder.embed_tokens.weight': table,
                      'lm_head.weight': table, unused: np.ones((32, 2), np.float32)}
  model, folder = written('t5', old, scale_decoder_outputs=..., dense_act_fn=..., is_gated_act=...,
                          n_positions=77, output_past=True)
  words(folder)
  ours = lean.load(folder)
  assert ours.config.tied and ours.config.context == 77
  close(ours.logits(SOURCE, decoder_tokens=TARGET), theirs(model))


def test_a_bare_bart_has_no_prefix_and_no_bias_of_the_logits(written):
  def bare(tensors):
    tensors = {k.removeprefix('model.'): x for k, x in tensors.items()}
    del tensors['final_logits_bias']
    return tensors | {'encoder.version': np.ones(1, np.float32),
                      'encoder.embed_tokens.weight': tensors['shared.weight']}
  model, folder = written('bart', bare)
  words(folder)
  close(lean.load(folder).logits(SOURCE, decoder_tokens=TARGET), theirs(model))


@pytest.mark.parametrize('family', SMALL)
def test_tables_that_differ_are_refused(written, family):
  prefix = dict(t5='', bart='model.')[family]
  name = f'{prefix}encoder.embed_tokens.weight'
  _, folder = written(family, lambda t: t | {name: t[f'{prefix}shared.weight'] + 1})
  with pytest.raises(InputError, match=f'{name} that differs'):
    load_hf(folder)


def test_a_bart_with_another_head_is_refused_and_a_t5_is_untied(written):
  other = lambda table: {'lm_head.weight': table + 1}
  _, folder = written('bart', lambda t: t | other(t['model.shared.weight']))
  with pytest.raises(InputError, match='lm_head.weight that differs'):
    load_hf(folder)
  _, folder = written('t5', lambda t: t | other(t['shared.weight']))
  assert not load_hf(folder)[1].tied


def test_tokens_that_generation_config_names_are_the_ones(written):
  _, folder = written('bart', forced_bos_token_id=9)
  path = folder / 'generation_config.json'
  given = json.loads(path.read_text()) | dict(decoder_start_token_id=5, forced_bos_token_id=7)
  del given['forced_eos_token_id']
  path.write_text(json.dumps(given))
  config = load_hf(folder)[1]
  assert (config.start, config.first, config.last) == (5, 7, None)
  path.unlink()
  config = load_hf(folder)[1]
  assert (config.start, config.first, config.last) == (2, 9, 2)


@pytest.mark.parametrize('family', SMALL)
def test_a_saved_model_is_the_same_model(written, family, tmp_path):
  _, folder = written(family)
  words(folder)
  model = lean.quantize(lean.load(folder), 'w8a8')
  lean.save(model, tmp_path / 'saved')
  again = lean.load(tmp_path / 'saved')
  assert again.config == model.config
  np.testing.assert_array_equal(again.logits(SOURCE, decoder_tokens=TARGET),
                                model.logits(SOURCE, decoder_tokens=TARGET))


def test_a_model_writes_the_text_of_a_source_and_not_the_source(written):
  model, folder = written('t5')
  words(folder)
  ids = model.generate(torch.tensor([[5, 9, 14, 1]]), max_new_tokens=6, do_sample=False)[0].tolist()
  ends = ids.index(1) if 1 in ids else None
  wanted = ' '.join(str(k) for k in ids[1:ends] if k > 2)
  assert lean.load(folder).generate('5 9 14', tokens=6) == wanted != ''


def test_a_sentencepiece_tokenizer_is_read_once_it_is_converted(real_data, tmp_path):
  pytest.importorskip('sentencepiece')
  (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='t5')))
  (tmp_path / 'spiece.model').write_bytes(
      (real_data / 'tokenizers' / 't5' / 'spiece.model').read_bytes())
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  theirs.save_pretrained(tmp_path)
  ours, text = load_tokenizer(tmp_path), 'translate English to German: two words'
  assert theirs(text)['input_ids'] == [*ours.encode(text), ours.eos]
  assert ours.decode(ours.encode(text)) == text


def test_a_target_is_asked_for_and_taken_only_where_it_means_something(written, tiny_model):
  _, folder = written('t5')
  words(folder)
  with pytest.raises(InputError, match='t5 needs decoder_tokens'):
    lean.load(folder).logits(SOURCE)
  with pytest.raises(InputError, match='llama has no decoder_tokens'):
    tiny_model.logits(SOURCE, decoder_tokens=TARGET)


def test_text_without_targets_is_refused(written):
  _, folder = written('bart')
  words(folder)
  model = lean.load(folder)
  for call in (lambda: lean.train(model, 'text.txt', steps=1), lambda: lean.distill(
      model, 'text.txt', steps=1), lambda: lean.evaluate(model, 'text.txt')):
    with pytest.raises(InputError, match='a bart writes a target of a source'):
      call()


def test_padding_of_a_source_is_not_seen(written):
  model, folder = written('t5')
  words(folder)
  mask = np.ones(SOURCE.shape, bool)
  mask[1, 6:] = False
  ours = lean.load(folder).logits(SOURCE, mask, decoder_tokens=TARGET)
  short = lean.load(folder).logits(SOURCE[1:, :6], decoder_tokens=TARGET[1:])
  close(ours[1:], np.asarray(short))
  assert np.abs(np.asarray(ours)[0] - theirs(model)[0]).max() < 1e-4
