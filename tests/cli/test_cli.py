"""The command line: each verb on a real folder, and each bad input as one line and exit code 2."""
import errno
import json
import pathlib
import subprocess
import sys

import pytest

import lean_jax as lean
from lean_jax.cli import main

CONFIG = str(pathlib.Path(__file__).parents[2] / 'experiments' / 'lean_pipeline.py') + ':tiny'


@pytest.fixture(scope='module')
def folder(tiny_model, tmp_path_factory):
  path = tmp_path_factory.mktemp('models') / 'tiny'
  lean.save(tiny_model, path, format='hf')
  return path


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp('texts') / 'text.txt'
  path.write_text('The quick brown fox jumps over the lazy dog.\n\n' * 200)
  return path


def fails(capsys, *arguments, says):
  """The command exits with 2 and one line that has all of `says`."""
  assert main([str(a) for a in arguments]) == 2
  line = capsys.readouterr().err.strip().splitlines()[-1]
  assert line.startswith('lean-jax: ')
  for word in says:
    assert word in line
  return line


def test_info_names_each_weight_and_its_kind(folder, capsys):
  assert main(['info', str(folder), '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['family'] == 'llama'
  assert {w['kind'] for w in found['weights']} == {'float32'}
  norms = found['parameters'] - sum(w['parameters'] for w in found['weights'])
  assert found['bytes'] == 4 * found['parameters'] and norms > 0
  assert main(['info', str(folder)]) == 0
  assert 'layers/mlp/down/kernel' in capsys.readouterr().out


def test_quantize_eval_and_generate_on_what_it_made(folder, text, tmp_path, capsys):
  out = tmp_path / 'w4'
  assert main(['quantize', str(folder), str(out), '--scheme', 'w4a16-g16', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['bytes_after'] < found['bytes_before']
  assert main(['info', str(out), '--json']) == 0
  kinds = {w['name']: w['kind'] for w in json.loads(capsys.readouterr().out)['weights']}
  assert kinds['layers/mlp/up/kernel'] == 'w4a16-g16' and kinds['embed/table'] == 'float32'
  assert main(['eval', str(out), '--data', str(text), '--window', '32', '--json']) == 0
  assert {'perplexity', 'nll', 'bits_per_byte', 'tokens', 'seconds'} <= set(
      json.loads(capsys.readouterr().out))
  assert main(['generate', str(out), '--prompt', 'The', '--tokens', '5']) == 0
  assert capsys.readouterr().out.startswith('The')


def test_a_missing_folder_or_file(folder, capsys, tmp_path):
  fails(capsys, 'info', tmp_path / 'nope', says=['nope'])
  fails(capsys, 'eval', folder, '--data', tmp_path / 'nope.txt', says=['nope.txt'])


def test_an_empty_corpus(folder, capsys, tmp_path):
  (tmp_path / 'empty.txt').write_text('')
  fails(capsys, 'eval', folder, '--data', tmp_path / 'empty.txt', says=['empty.txt', 'text'])


def test_a_corpus_smaller_than_one_batch(capsys, tmp_path):
  (tmp_path / 'small.txt').write_text('a few words and lines\n' * 300)
  fails(capsys, 'run', f'--config={CONFIG}', f'--workdir={tmp_path / "w"}',
        f'--config.data.path={tmp_path / "small.txt"}', '--config.data.window=32',
        '--config.training.batch=100000', says=['batch of 100000', 'tokens'])


def test_an_unknown_config_key_names_the_nearest(capsys, tmp_path):
  fails(capsys, 'run', f'--config={CONFIG}', f'--workdir={tmp_path / "w"}',
        '--config.phases.teacher.stepz=3', says=['stepz', 'steps'])
  fails(capsys, 'run', f'--config={CONFIG[:-4]}huge', f'--workdir={tmp_path / "w"}',
        says=['huge', 'tiny'])
  assert not (tmp_path / 'w').exists()


def test_a_checkpoint_of_another_architecture(folder, capsys, tmp_path):
  other = tmp_path / 'other'
  other.mkdir()
  for file in folder.iterdir():
    (other / file.name).write_bytes(file.read_bytes())
  config = json.loads((folder / 'config.json').read_text())
  (other / 'config.json').write_text(json.dumps(config | dict(model_type='rwkv')))
  fails(capsys, 'info', other, says=['rwkv', 'llama'])


def test_a_truncated_safetensors(folder, capsys, tmp_path):
  broken = tmp_path / 'broken'
  broken.mkdir()
  for file in folder.iterdir():
    (broken / file.name).write_bytes(file.read_bytes())
  data = (folder / 'model.safetensors').read_bytes()
  (broken / 'model.safetensors').write_bytes(data[:len(data) // 2])
  fails(capsys, 'info', broken, says=['model.safetensors', 'download'])


def test_a_flipped_bit_in_a_saved_model(tiny_model, capsys, tmp_path):
  lean.save(tiny_model, tmp_path / 'model')
  card = tmp_path / 'model' / 'lean.json'
  card.write_text(card.read_text().replace('float32', 'float16', 1))
  fails(capsys, 'info', tmp_path / 'model', says=['damaged'])


def test_a_mesh_without_its_devices(capsys, tmp_path):
  fails(capsys, 'run', f'--config={CONFIG}', f'--workdir={tmp_path / "w"}',
        '--config.mesh.data=64', says=['64', 'devices'])


def test_a_disk_that_is_full_while_saving(folder, capsys, tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr('lean_jax.training.checkpoint.ocp.StandardCheckpointer.save', full)
  fails(capsys, 'quantize', folder, tmp_path / 'out', '--scheme', 'w8a8', says=['space'])
  assert not list(tmp_path.iterdir())


def test_a_scheme_out_of_the_grammar_and_a_rule_that_matches_nothing(folder, capsys, tmp_path):
  fails(capsys, 'quantize', folder, tmp_path / 'q', '--scheme', 'w5a16', says=['w5a16', 'w4a16'])
  fails(capsys, 'quantize', folder, tmp_path / 'q', '--scheme', 'w8a8', '--where', 'layer/.*',
        says=['layer/.*', 'layers/'])


def test_nothing_is_overwritten(folder, capsys, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.txt').write_text('years of work')
  fails(capsys, 'quantize', folder, tmp_path / 'mine', '--scheme', 'w8a8', says=['mine'])
  assert [p.name for p in (tmp_path / 'mine').iterdir()] == ['thesis.txt']


def test_a_work_directory_of_another_run(capsys, tmp_path):
  (tmp_path / 'settings.json').write_text(json.dumps(dict(seed=12345)))
  fails(capsys, 'run', f'--config={CONFIG}', f'--workdir={tmp_path}', says=['seed', '--workdir'])


@pytest.mark.parametrize('verb', ['demo', 'run', 'info', 'eval', 'generate', 'quantize'])
def test_each_verb_has_help_with_an_example(verb, capsys):
  with pytest.raises(SystemExit) as done:
    main([verb, '--help'])
  assert done.value.code == 0
  assert f'example: lean-jax {verb}' in capsys.readouterr().out


def test_help_and_import_are_light():
  heavy = {'jax', 'flax', 'numpy', 'orbax', 'grain', 'rich', 'absl'}
  code = ('import sys, lean_jax, lean_jax.cli; '
          f'print(*sorted({heavy!r} & set(sys.modules)))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == []


def test_importing_the_api_starts_no_backend():
  code = ('import lean_jax; lean_jax.load; import jax._src.xla_bridge as b; '
          'assert not b._backends, b._backends')
  subprocess.run([sys.executable, '-c', code], check=True)
