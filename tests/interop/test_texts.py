"""Vectors and classes of texts, against transformers and sentence-transformers."""
import json

import numpy as np
import pytest
import safetensors.numpy

import lean_jax as lean
from lean_jax.data.tokenizer import load_tokenizer
from lean_jax.errors import InputError
from lean_jax.interop.hf import load_hf
from lean_jax.weights import Quantized

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.filterwarnings('ignore')             # transformers' own

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcdefghijklmnopqrstuvwxyz',
         *(f'##{letter}' for letter in 'abcdefghijklmnopqrstuvwxyz')]
SMALL = dict(vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, max_position_embeddings=24, initializer_range=.2)
DISTIL = dict(vocab_size=len(WORDS), dim=16, n_layers=2, n_heads=2, hidden_dim=20,
              max_position_embeddings=24, initializer_range=.2)
LABELS = dict(id2label={0: 'bad', 1: 'so-so', 2: 'good'},
              label2id={'bad': 0, 'so-so': 1, 'good': 2})
TEXTS = ['a cat sat', 'on', 'the mat and there it sat', 'B C']
PAIRS = [('a cat', 'sat on it'), ('q', 'r s t u v w x y'), ('on', 'off')]
LONG = ' '.join('abcdefghijklmnopqrstuvwxyz')


@pytest.fixture
def written(tmp_path):
  """The function (class, edit of the tensors, keys of the config) -> (their model, folder)."""
  def write(name='BertModel', edit=lambda tensors: tensors, **changes):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    small = DISTIL if name.startswith('Distil') else SMALL
    model = cls(cls.config_class(**small | changes)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / 'model.safetensors'
    tensors = edit(safetensors.numpy.load_file(path))
    safetensors.numpy.save_file({k: x.copy() for k, x in tensors.items()}, path,
                                metadata=dict(format='pt'))
    (tmp_path / 'vocab.txt').write_text('\n'.join(WORDS) + '\n')
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(
        tokenizer_class='DistilBertTokenizer' if small is DISTIL else 'BertTokenizer')))
    return model, tmp_path
  return write


def sentence(folder, modules=('Transformer', 'Pooling', 'Normalize'), pooling=None, reading=None,
             about=None):
  """Writes what sentence-transformers does."""
  files = {
      'modules.json': [dict(idx=k, name=str(k), path=f'{k}_{kind}' if k else '', type=(
          f'sentence_transformers.models.{kind}')) for k, kind in enumerate(modules)],
      '1_Pooling/config.json': dict(word_embedding_dimension=64, **pooling or dict(
          pooling_mode_mean_tokens=True)),
      'sentence_bert_config.json': reading or dict(max_seq_length=9, do_lower_case=False)}
  if about:
    files['config_sentence_transformers.json'] = about
  for name, value in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value))
  if 'Normalize' in modules:
    (folder / '2_Normalize').mkdir(exist_ok=True)
  return folder


def theirs(model, folder, texts, **kw):
  """(what transformers computes of texts, their masks)."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  pairs = not isinstance(texts[0], str)
  given = tokenizer(*(map(list, zip(*texts)) if pairs else [texts]), padding=True,
                    return_tensors='pt', **kw)
  with torch.no_grad():
    return model(**given), given['attention_mask'].numpy()


def close(ours, wanted):
  # float32, as in parity.py.
  np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize('name', ['Bert', 'DistilBert'])
def test_texts_and_pairs_have_the_logits_of_transformers(written, name):
  model, folder = written(f'{name}ForSequenceClassification', **LABELS)
  ours = lean.load(folder)
  assert ours.labels == ('bad', 'so-so', 'good')
  for texts in (TEXTS, PAIRS):
    found = ours.classify(texts, batch=2)
    assert found.dtype == np.float32 and found.shape == (len(texts), 3)
    close(found, theirs(model, folder, texts)[0].logits.numpy())
  assert ours.classify([]).shape == (0, 3)


def test_a_pair_that_is_too_long_is_refused_or_cut_as_transformers_cuts(written):
  model, folder = written('BertForSequenceClassification')
  ours, pairs = lean.load(folder), [(LONG, 'a b c'), (LONG, LONG), ('a', LONG)]
  with pytest.raises(InputError, match='32 tokens, the model reads 24 at most'):
    ours.classify(pairs)
  wanted, _ = theirs(model, folder, pairs, truncation='longest_first', max_length=24)
  close(ours.classify(pairs, truncate=True), wanted.logits.numpy())


def test_a_model_that_is_no_sentence_encoder_gives_the_mean_of_its_hidden_states(written):
  model, folder = written()
  ours = lean.load(folder)
  out, mask = theirs(model, folder, TEXTS)
  mask = mask[..., None]
  close(ours.embed(TEXTS), (out.last_hidden_state.numpy() * mask).sum(1) / mask.sum(1))
  assert ours.embed([]).shape == (0, 64)
  with pytest.raises(InputError, match='28 tokens, the model reads 24'):
    ours.embed([LONG])
  assert ours.embed([LONG], truncate=True).shape == (1, 64)


@pytest.mark.parametrize(('modules', 'pooling', 'reading', 'about'), [
    (('Transformer', 'Pooling', 'Normalize'), None, None, None),
    (('Transformer', 'Pooling'), dict(pooling_mode_cls_token=True), None, None),
    (('Transformer', 'Pooling'), dict(pooling_mode=['weightedmean', 'max', 'lasttoken']),
     dict(max_seq_length=None), None),
    (('Transformer', 'Pooling', 'Normalize'), dict(pooling_mode='mean_sqrt_len_tokens'),
     dict(max_seq_length=12, do_lower_case=True), dict(
         prompts=dict(query='q: ', passage='p: '), default_prompt_name='query')),
])
def test_sentences_have_the_vectors_of_sentence_transformers_and_after_saving(
    written, tmp_path, modules, pooling, reading, about):
  SentenceTransformer = pytest.importorskip('sentence_transformers').SentenceTransformer
  _, folder = written()
  sentence(folder, modules, pooling, reading, about)
  texts = [*TEXTS, LONG]
  wanted = SentenceTransformer(str(folder), device='cpu').encode(texts)
  ours = lean.load(folder)
  close(ours.embed(texts, batch=2), wanted)
  assert (np.abs(np.linalg.norm(ours.embed(texts), axis=1) - 1) < 1e-5).all() == (
      'Normalize' in modules)
  lean.save(ours, tmp_path / 'lean')
  again = lean.load(tmp_path / 'lean')
  assert again.config == ours.config
  lean.save(again, tmp_path / 'hf', format='hf')
  np.testing.assert_array_equal(lean.load(tmp_path / 'hf').embed(texts), ours.embed(texts))
  saved = SentenceTransformer(str(tmp_path / 'hf'), device='cpu')
  np.testing.assert_array_equal(saved.encode(texts), wanted)
  if about:
    assert saved.prompts['passage'] == 'p: '


REFUSED = [
    (dict(modules=('Transformer', 'Pooling', 'Dense')), 'Dense'),
    (dict(modules=('Pooling',)), 'Pooling'),
    (dict(pooling=dict(pooling_mode='mode')), 'mode'),
    (dict(reading=dict(max_seq_length=0)), 'max_seq_length = 0'),
    (dict(reading=dict(transformer_task='fill-mask')), 'transformer_task'),
    (dict(pooling=dict(pooling_mode='mean', include_prompt=False),
          about=dict(prompts=dict(a='b'), default_prompt_name='a')), 'include_prompt'),
    (dict(about=dict(default_prompt_name='a')), 'no such prompt'),
]


@pytest.mark.parametrize(('changes', 'words'), REFUSED)
def test_what_is_not_computed_of_sentences_is_refused_by_its_name(written, changes, words):
  _, folder = written()
  sentence(folder, **changes)
  with pytest.raises(InputError, match=words) as error:
    lean.load(folder)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('text', ['{', '{}', '[3]', '[{"idx": 0}]'])
def test_a_damaged_list_of_modules_is_one_line(written, text):
  _, folder = written()
  (folder / 'modules.json').write_text(text)
  with pytest.raises(InputError, match=r'modules\.json'):
    lean.load(folder)


def test_what_models_are_not_made_for_is_refused(written, tiny_model):
  _, folder = written()
  ours = lean.load(folder)
  for wrong, words in [
      (lambda: ours.classify(TEXTS), 'gives texts no classes'),
      (lambda: tiny_model.classify(TEXTS), 'gives texts no classes'),
      (lambda: ours.embed('a text'), 'give a list of strings'),
      (lambda: ours.embed(['a', 3]), 'a text is 3'),
      (lambda: ours.embed([('a', 'b')]), 'give strings'),
      (lambda: ours.embed(['a'], batch=0), 'batch 0'),
      (lambda: ours.generate('a'), 'sees all tokens at once'),
      (lambda: lean.train(ours, 'stdlib', steps=1), 'predicts no next one'),
      (lambda: lean.evaluate(ours, 'stdlib'), 'predicts no next one'),
      (lambda: tiny_model.logits([[1]], token_types=[[0]]), 'no token_types')]:
    with pytest.raises(InputError, match=words) as error:
      wrong()
    assert '\n' not in str(error.value)
  assert ours.labels == tiny_model.labels == ()


def test_a_decoder_has_vectors_too(tiny_model):
  vectors = tiny_model.embed(['the quick fox', 'a'], batch=1)
  (ids, _), = tiny_model.tokenizer.rows(['the quick fox'])
  x, _ = tiny_model.module.apply({'params': tiny_model.params}, ids[None], method='hidden')
  close(vectors[0], np.asarray(x)[0].mean(axis=0))


@pytest.mark.parametrize('scheme', ['w8a8', 'w4a16-g64'])
def test_a_quantized_encoder_gives_vectors_near_the_whole_ones(written, scheme):
  _, folder = written()
  sentence(folder)
  ours = lean.load(folder)
  small = lean.quantize(ours, scheme)
  kernel = small.params['layers']['mlp']['up']['kernel']
  assert isinstance(kernel, Quantized)
  cosine = (small.embed(TEXTS) * ours.embed(TEXTS)).sum(axis=1)
  assert cosine.min() > (.99 if scheme == 'w8a8' else .9)     # of a model of random weights
  adapted = lean.attach_lora(small, rank=2)
  close(adapted.embed(TEXTS), small.embed(TEXTS))


def test_an_encoder_saved_for_transformers_is_given_what_it_takes(written, tmp_path):
  """DistilBERT has no types of tokens, and BERT has."""
  model, folder = written('DistilBertModel')
  lean.save(lean.load(folder), tmp_path / 'hf', format='hf')
  assert 'token_type_ids' not in transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')('a')
  close(theirs(model, tmp_path / 'hf', PAIRS)[0][0].numpy(),
        theirs(model, folder, PAIRS)[0][0].numpy())


def test_a_bert_saved_for_transformers_is_given_types(written, tmp_path):
  model, folder = written()
  lean.save(lean.load(folder), tmp_path / 'hf', format='hf')
  close(theirs(model, tmp_path / 'hf', PAIRS)[0][0].numpy(),
        theirs(model, folder, PAIRS)[0][0].numpy())


def test_old_checkpoints_of_bert_are_read(written):
  """Gamma and beta, a buffer of positions, copies of the head, and what pretraining had beside."""
  def old(tensors):
    tensors = {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
        'LayerNorm.bias', 'LayerNorm.beta'): x for k, x in tensors.items()}
    return tensors | {
        'cls.predictions.decoder.weight': tensors['bert.embeddings.word_embeddings.weight'],
        'cls.predictions.decoder.bias': tensors['cls.predictions.bias'],
        'bert.embeddings.position_ids': np.arange(24)[None],
        'bert.pooler.dense.weight': np.ones((64, 64), np.float32),
        'bert.pooler.dense.bias': np.ones(64, np.float32),
        'cls.seq_relationship.weight': np.ones((2, 64), np.float32),
        'cls.seq_relationship.bias': np.ones(2, np.float32)}
  model, folder = written('BertForMaskedLM', old)
  tokens = np.arange(5, 25).reshape(2, 10)
  with torch.no_grad():
    close(lean.load(folder).logits(tokens), model(torch.tensor(tokens)).logits.numpy())


def test_a_head_that_is_not_the_table_is_refused(written):
  other = lambda t: t | {'cls.predictions.decoder.weight': t[
      'bert.embeddings.word_embeddings.weight'] + 1}
  _, folder = written('BertForMaskedLM', other)
  with pytest.raises(InputError, match=r'decoder\.weight that differs'):
    load_hf(folder)


def test_a_bare_bert_without_a_pooler_has_none(written, tmp_path):
  drop = lambda t: {k: x for k, x in t.items() if 'pooler' not in k}
  model, folder = written('BertModel', drop)
  ours = lean.load(folder)
  assert ours.config.transform is None and 'transform' not in ours.params
  tokens = np.arange(5, 25).reshape(2, 10)
  with torch.no_grad():
    close(ours.logits(tokens), model(torch.tensor(tokens))[0].numpy())
  lean.save(ours, tmp_path / 'lean')
  assert lean.load(tmp_path / 'lean').config == ours.config


def test_a_head_without_its_tensors_is_refused(written):
  _, folder = written('BertModel')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | dict(
      architectures=['BertForSequenceClassification'])))
  with pytest.raises(InputError, match=r'missing classifier\.bias, classifier\.weight'):
    load_hf(folder)


def test_a_vocabulary_alone_is_read_as_transformers_reads_it(real_data, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(dict(model_type='bert')))
  (tmp_path / 'vocab.txt').write_bytes(
      (real_data / 'tokenizers' / 'bert_uncased' / 'vocab.txt').read_bytes())
  ours = load_tokenizer(tmp_path)
  theirs = transformers.BertTokenizer(vocab=str(tmp_path / 'vocab.txt'))
  for text in ('Jim Henson was a puppeteer.', 'Ünïcödé: 東京, naïve! [MASK] x\x00y', ''):
    wanted = theirs(text, 'and more')
    (ids, types), = ours.rows([(text, 'and more')])
    assert ids.tolist() == wanted['input_ids'] and types.tolist() == wanted['token_type_ids']
  assert ours.size == 30522
