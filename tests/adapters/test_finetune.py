"""Fine-tuning by examples, in Python and on the command line."""
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import lean_jax as lean
from lean_jax import tree
from lean_jax.api.training import begin
from lean_jax.cli import main
from lean_jax.training import finetune
from lean_jax.weights import LowRank, Quantized
from tests.adapters.test_beside import bare

RECORDS = [dict(instruction=f'say {word}', output=f'{word} fox') for word in (
    'the', 'quick', 'brown', 'lazy', 'dog', 'over')]
TEMPLATE = '{% for m in messages %}{{ m.content }}\n{% endfor %}'
KW = dict(adapter=dict(rank=2, where='layers/(attention/q|mlp)/.*'), window=64, batch=2,
          template=TEMPLATE, peak=3e-2)


@pytest.fixture(scope='module')
def wide(tiny_model):
  """A model whose matrices have the 64 inputs of a group of nf4-g64-dq."""
  config = dataclasses.replace(tiny_model.config, width=64, head_width=32, hidden=64, layers=1)
  params = jax.jit(config.module.init)(jax.random.key(0), np.zeros((1, 4), np.int32))['params']
  return dataclasses.replace(tiny_model, config=config, params=params)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'some.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in RECORDS))
  return path


def answered(model, windows):
  """The mean loss of the learned tokens."""
  from lean_jax.objectives.language_modeling import next_token
  return float(next_token(model.module)(model.params, windows.batch(np.arange(len(windows))),
                                        None)[0])


@pytest.mark.slow
def test_qlora_rounds_learns_the_answers_and_leaves_the_base(wide, data):
  windows = finetune.example_windows(wide, data, window=64, template=TEMPLATE)
  assert windows.packed and windows.examples == 6 > len(windows)
  base = lean.quantize(wide, 'nf4-g64-dq')
  tuned = lean.finetune(wide, data, steps=8, **KW)
  assert answered(tuned, windows) < .8 * answered(base, windows)
  layer = tuned.params['layers']
  up = layer['mlp']['up']['kernel']
  assert isinstance(up, LowRank) and isinstance(up.base, Quantized) and up.a.shape[-1] == 2
  jax.tree.map(np.testing.assert_array_equal, up.base, base.params['layers']['mlp']['up']['kernel'])
  rounded = lean.quantize(wide, 'w4a16-g16')
  again = begin(rounded, 'qlora')
  assert str(again.params['layers']['mlp']['up']['kernel'].base.spec) == 'w4a16-g16'


@pytest.mark.slow
@pytest.mark.parametrize('method', ['full', 'lora', 'dora', 'vera', 'pissa', 'ia3', 'houlsby',
                                    'prefix', 'prompt'])
def test_a_method_trains_what_is_its_own(tiny_model, data, method):
  settings = dict(vera=dict(rank=8), houlsby=dict(rank=4), prefix=dict(tokens=2, hidden=8)).get(
      method)
  tuned = lean.finetune(tiny_model, data, method=method, steps=2, window=64, batch=2, peak=1e-2,
                        adapter=settings, template=TEMPLATE)
  before = begin(tiny_model, method, settings)
  changed = [n for n, x in tree.named_arrays(tuned.params).items()
             if bool((x != tree.named_arrays(before.params)[n]).any())]
  assert changed and (method != 'full' or len(changed) == len(tree.named_arrays(tuned.params)))
  if method != 'full':
    assert not any(n.endswith(('base/value', 'scale', 'embed/table')) for n in changed)


class Killed(BaseException):
  """What nobody catches."""


def killing(step, metrics):
  """A hook that ends a run at its third step."""
  del metrics
  if step == 3:
    raise Killed


def resumable(model, data, folder, method, **kw):
  adapter = dict(lora=dict(rank=2, dropout=.1), prefix=dict(tokens=2, hidden=8)).get(method)
  return lean.finetune(model, data, **dict(
      method=method, adapter=adapter, steps=5, window=64, batch=2, template=TEMPLATE, peak=1e-2,
      workdir=folder, save_every=2) | kw)


def same_bits(one, other):
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.parametrize('method', ['lora', *(
    pytest.param(m, marks=pytest.mark.slow) for m in ('full', 'prefix'))])
def test_a_run_killed_at_a_step_goes_on_to_the_same_bits(tiny_model, data, tmp_path, method):
  run = lambda name, **kw: resumable(tiny_model, data, tmp_path / name, method, **kw)
  whole, seen = run('whole'), []
  with pytest.raises(Killed):
    run('cut', hooks=(killing,))
  look = (lambda step, _: seen.append(step),)
  again = run('cut', hooks=look)
  assert seen == [3, 4, 5]                             # the checkpoint is of step 2
  same_bits(again, whole)
  same_bits(run('cut', hooks=look), whole)
  assert seen == [3, 4, 5]                             # there was nothing left to do
  begun = begin(tiny_model, method, dict(lora=dict(rank=2, dropout=.1), prefix=dict(
      tokens=2, hidden=8)).get(method))
  assert any(bool((a != b).any()) for a, b in zip(*(jax.tree.leaves(m.params) for m in (
      whole, begun))))
  with pytest.raises(lean.InputError, match='another settings'):
    run('cut', peak=2e-2)
  with pytest.raises(lean.InputError, match='another data'):
    run('cut', window=40)


@pytest.mark.slow
def test_a_process_that_was_killed_goes_on_to_the_same_bits(tiny_model, data, tmp_path):
  lean.save(tiny_model, tmp_path / 'model')
  script = f"""
import os, signal
import lean_jax as lean
from tests.adapters.test_finetune import resumable
kill = lambda step, _: step == 3 and os.kill(os.getpid(), signal.SIGKILL)
resumable(lean.load({str(tmp_path / 'model')!r}), {str(data)!r}, {str(tmp_path / 'cut')!r}, 'lora',
          hooks=(kill,))"""
  done = subprocess.run([sys.executable, '-c', script], cwd=pathlib.Path(__file__).parents[2],
                        capture_output=True, text=True, timeout=600)
  assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
  model, seen = lean.load(tmp_path / 'model'), []
  again = resumable(model, data, tmp_path / 'cut', 'lora', hooks=(lambda s, _: seen.append(s),))
  assert seen[0] in (1, 3) and seen[-1] == 5           # a save may have been on its way
  same_bits(again, resumable(model, data, tmp_path / 'whole', 'lora'))


def test_methods_that_do_not_fit_are_refused(tiny_model, data):
  run = lambda model=tiny_model, **kw: lean.finetune(
      model, data, **dict(steps=1, template=TEMPLATE) | kw)
  for kw, said in ((dict(method='lola'), 'there are: qlora, lora'),
                   (dict(method='bitfit'), 'matches no array'),
                   (dict(method='full', adapter=dict(rank=2)), 'has no adapter'),
                   (dict(method='lora', adapter=dict(rank=64)), 'rank 64'),
                   (dict(), "lean.quantize"), (dict(window=65), 'context of 64'),
                   (dict(method='full', epochs=0., steps=None), '0.0 epochs')):
    with pytest.raises(lean.InputError, match=said):
      run(**kw)
  with pytest.raises(lean.InputError, match='float model'):
    run(lean.quantize(tiny_model, 'w8a16'), method='full')
  with pytest.raises(lean.InputError, match='adapters already'):
    run(lean.attach_lora(tiny_model, rank=2))
  with pytest.raises(lean.InputError, match='some.jsonl:1: .* no chat template'):
    run(template='other')
  with pytest.raises(lean.InputError, match='none of 6 examples'):
    run(template=None)                                 # Alpaca's own prompt is longer than this


def test_a_model_with_a_state_is_given_padded_examples(tiny_model, data):
  model = dataclasses.replace(bare('lean_lstm'), tokenizer=tiny_model.tokenizer)
  with pytest.raises(lean.InputError, match='packing for a lean_lstm, whose lstm layers'):
    finetune.example_windows(model, data, packing=True)
  windows = finetune.example_windows(model, data, window=64, template=TEMPLATE)
  assert not windows.packed and len(windows) == 6 and set(windows.batch(np.arange(2))) == {
      'tokens', 'labels', 'mask'}


def test_the_verb_writes_an_adapter_and_says_what_it_was_trained_on(wide, data, tmp_path, capsys):
  lean.save(wide, tmp_path / 'base', format='hf')
  out = tmp_path / 'adapter'
  (tmp_path / 'chat.jinja').write_text(TEMPLATE)
  command = ['finetune', str(tmp_path / 'base'), '--data', str(data), '--out', str(out), '--steps',
             '3', '--batch', '2', '--window', '64', '--peak', '.03', '--set', 'rank=2', '--set',
             'where=layers/mlp/down/kernel', '--template', str(tmp_path / 'chat.jinja'), '--json']
  assert main(command) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['format'] == 'peft' and found['examples'] == 6 and found['steps'] == 3
  assert np.isfinite(found['loss']) and not list(tmp_path.glob('.adapter*'))
  base = lean.quantize(lean.load(tmp_path / 'base'), 'nf4-g64-dq')
  tuned = lean.load_adapter(base, out)
  tokens = np.arange(12)[None]
  assert float(abs(tuned.logits(tokens) - base.logits(tokens)).max()) > 0
  assert main(command) == 2 and 'is there already' in capsys.readouterr().err
  bad = tmp_path / 'bad.jsonl'
  bad.write_text('{"text": "a"}\n{"text": 1}\n')
  assert main([*command[:3], str(bad), '--out', str(tmp_path / 'other')]) == 2
  assert f"{bad}:2: 'text' is a int" in capsys.readouterr().err


def test_parts_of_a_product_that_training_moved_apart_are_saved_as_a_whole_model(
    wide, data, tmp_path, capsys):
  gpt2 = lean.create('gpt2', wide.tokenizer, n_embd=32, n_layer=1, n_head=2, n_positions=64)
  lean.save(gpt2, tmp_path / 'base', format='hf')
  (tmp_path / 'chat.jinja').write_text(TEMPLATE)
  out = tmp_path / 'tuned'
  assert main(['finetune', str(tmp_path / 'base'), '--data', str(data), '--out', str(out),
               '--method', 'vera', '--steps', '2', '--batch', '2', '--window', '64', '--set',
               'rank=2', '--set', 'where=layers/attention/(q|k|v)/kernel', '--template',
               str(tmp_path / 'chat.jinja'), '--json']) == 0
  said = capsys.readouterr()
  assert json.loads(said.out)['format'] == 'lean' and 'one d of the whole' in said.err
  assert lean.load(out).config == gpt2.config
