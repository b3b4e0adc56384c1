"""Fine-tuning an encoder and a decoder by sources and targets."""
import json

import jax
import numpy as np
import pytest
import tokenizers

import lean_jax as lean
from lean_jax.adapters.trained import trained
from lean_jax.cli import main
from lean_jax.data.tokenizer import Tokenizer
from lean_jax.generation import generate
from lean_jax.generation.text import truncated
from lean_jax.models.prefix import settled
from lean_jax.objectives.language_modeling import next_token
from lean_jax.training import finetune
from lean_jax.weights import LowRank, Quantized
from tests.adapters.stirring import stirred

WORDS = ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'lazy', 'dog']
RECORDS = [dict(source=word, target=f'{WORDS[-k]} quick') for k, word in enumerate(WORDS[:5], 1)]
T5 = dict(d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2,
          relative_attention_num_buckets=8, relative_attention_max_distance=20, n_positions=32,
          tie_word_embeddings=False)
BART = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_position_embeddings=32, decoder_start_token_id=1, forced_eos_token_id=None)


@pytest.fixture(scope='module')
def tokenizer():
  """Words, and the end of a text, as T5's has it."""
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {w: k for k, w in enumerate(['<pad>', '</s>', '<unk>', *WORDS])}, '<unk>'))
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  backend.add_special_tokens(['<pad>', '</s>', '<unk>'])
  backend.post_processor = tokenizers.processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', 1)])
  return Tokenizer(backend, eos=1)


@pytest.fixture(scope='module')
def t5(tokenizer):
  return lean.create('t5', tokenizer, **T5)


def windows(model, **kw):
  return finetune.example_windows(model, RECORDS, **kw)


@pytest.mark.parametrize(('method', 'peak', 'adapter'), [('full', 1e-2, None), *(
    pytest.param(*row, marks=pytest.mark.slow) for row in (
        ('lora', 2e-2, dict(rank=16)), ('qlora', 2e-2, dict(rank=16)), ('ia3', .3, None),
        ('houlsby', 3e-2, dict(rank=16))))])
def test_a_tuned_t5_writes_the_answers_it_learned(t5, method, peak, adapter):
  tuned = lean.finetune(t5, RECORDS, method=method, steps=60 if method == 'full' else 300, batch=5,
                        peak=peak, adapter=adapter)
  sources, targets = zip(*(r.values() for r in RECORDS))
  assert t5.generate(list(sources), tokens=4) != list(targets)
  assert tuned.generate(list(sources), tokens=4) == list(targets)
  if method == 'qlora':
    w = tuned.params['decoder']['layers']['cross']['k']['kernel']
    assert isinstance(w, LowRank) and isinstance(w.base, Quantized)


@pytest.mark.parametrize(('method', 'moved'), [('p_tuning_v2', 'decoder'), ('prompt', 'encoder')])
def test_tokens_after_a_prefix_or_a_prompt_are_the_most_probable(t5, method, moved):
  model = stirred(lean.attach(t5, method, tokens=3), 2.)
  assert {name.split('/')[0] for name in trained(model.params).split('|')} == {moved}
  source = np.array([[3, 5, 8, 1], [4, 6, 1, 0]])
  rows = [row[row > 0] for row in source]
  out = np.asarray(generate(model.module, settled(model.module, model.params), rows, tokens=5))
  target = np.concatenate([np.zeros((2, 1), int), out[:, :-1]], axis=1)
  logits = np.asarray(model.logits(source, source > 0, decoder_tokens=target))
  np.testing.assert_array_equal(logits.argmax(axis=-1), out)
  base = np.asarray(t5.logits(source, source > 0, decoder_tokens=target))
  assert np.abs(logits - base).max() > .05 * np.abs(base).max()
  one = model.logits(rows[1][None], decoder_tokens=target[1:])
  np.testing.assert_allclose(logits[1:], one, atol=1e-5 * np.abs(logits).max())


def test_a_source_behind_a_prompt_has_that_much_less_room(t5):
  model = lean.attach(t5, 'prompt', tokens=4)
  with pytest.raises(lean.InputError, match='a source of 29 tokens, the model reads 28'):
    model.generate('fox ' * 28, tokens=2)
  ids = model.tokenizer.encode('fox ' * 28, special=True)
  assert truncated(model, ids, 2).tolist() == [*ids[:27], 1]
  with pytest.raises(lean.InputError, match='already'):
    lean.attach(model, 'prefix')
  prefixed = lean.attach(t5, 'p_tuning_v2', tokens=4)
  with pytest.raises(lean.InputError, match='a prompt of 5 tokens and 28 to generate'):
    prefixed.generate('fox', tokens=28)


def test_the_loss_is_that_of_the_targets_tokens_after_the_start_whatever_the_padding(t5):
  rows = windows(t5)
  batch = rows.batch(np.arange(len(rows)))
  loss = float(jax.jit(next_token(t5.module))(t5.params, batch, None)[0])
  nll = []
  for record in RECORDS:
    source, target = (t5.tokenizer.encode(record[k], special=True) for k in ('source', 'target'))
    logits = t5.logits(source[None], decoder_tokens=np.concatenate([[0], target[:-1]])[None])[0]
    nll += (-jax.nn.log_softmax(logits)[np.arange(len(target)), target]).tolist()
  np.testing.assert_allclose(loss, np.mean(nll), rtol=1e-5)            # float32


@pytest.mark.slow
def test_bitfit_of_a_bart_trains_its_biases_alone(tokenizer):
  bart = lean.create('bart', tokenizer, **BART)
  tuned = lean.finetune(bart, RECORDS, method='bitfit', steps=1, batch=2)
  changed = jax.tree_util.tree_map_with_path(
      lambda path, a, b: (jax.tree_util.keystr(path), bool((a != b).any())), bart.params,
      tuned.params)
  found = jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, tuple))
  assert all('bias' in name for name, moved in found if moved)
  assert any('encoder' in name for name, moved in found if moved)
  assert any('decoder' in name for name, moved in found if moved)


def test_what_has_no_sense_for_sources_is_refused(t5, tiny_model):
  for kw, said in ((dict(packing=True), 'packing for a t5'), (dict(window=33), 'context of 32'),
                   (dict(template='x'), 'no conversation'),
                   (dict(method='bitfit'), 'matches no array')):
    with pytest.raises(lean.InputError, match=said):
      lean.finetune(t5, RECORDS, **dict(method='full', steps=1) | kw)
  rows = windows(t5)
  assert not rows.packed and windows(t5, packing=False).fingerprint == rows.fingerprint
  assert finetune.example_windows(t5, rows) is rows
  with pytest.raises(lean.InputError, match='sources and targets for a llama'):
    finetune.example_windows(tiny_model, rows)
  texts = finetune.example_windows(tiny_model, [dict(text='the fox')])
  with pytest.raises(lean.InputError, match='rows of texts for a t5'):
    finetune.example_windows(t5, texts)


def test_the_verb_writes_an_adapter_of_a_t5(t5, tmp_path, capsys):
  (tmp_path / 'some.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in RECORDS))
  lean.save(t5, tmp_path / 'base', format='hf')
  command = ['finetune', str(tmp_path / 'base'), '--data', str(tmp_path / 'some.jsonl'), '--steps',
             '2', '--batch', '2', '--method', 'lora', '--set', 'rank=2', '--peak', '.1', '--json']
  assert main([*command, '--out', str(tmp_path / 'out')]) == 0
  found = json.loads(capsys.readouterr().out)
  assert (found['format'], found['examples'], found['learned_tokens']) == ('peft', 5, 15)
  base = lean.load(tmp_path / 'base')
  tuned, tokens = lean.load_adapter(base, tmp_path / 'out'), np.arange(2, 8)[None]
  difference = tuned.logits(tokens, decoder_tokens=tokens) - base.logits(
      tokens, decoder_tokens=tokens)
  assert float(abs(difference).max()) > 0
