"""The command line: each verb on a real folder, and each bad input as one line and exit code 2."""
import dataclasses
import errno
import io
import json
import pathlib
import subprocess
import sys

import jax
import pytest

import lean_jax as lean
from lean_jax.cli import main
from lean_jax.kernels.native import library

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


def test_info_without_a_model_says_which_kernels_run(capsys, monkeypatch):
  assert main(['info', '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['jax'] == jax.__version__ and 'cpu' in found['devices']
  assert found['native_kernels'] in library.LEVELS or library.why_not() in found['native_kernels']
  monkeypatch.setattr(library, 'why_not', lambda: 'was not built')
  assert main(['info']) == 0
  assert 'native_kernels: none, XLA in their place: was not built' in capsys.readouterr().out


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


def test_quantize_calibrates_goes_on_after_a_kill_and_says_what_it_cost(
    folder, text, tmp_path, capsys, monkeypatch):
  out = tmp_path / 'small'
  command = ['quantize', str(folder), str(out), '--scheme', 'w4a16-g8', '--method', 'awq',
             '--set', 'clip=absmax', '--rule', '.*/down/.*=w8a16', '--calibration', str(text),
             '--samples', '4', '--window', '16', '--data', str(text)]
  saved = lean.save

  def killed(*_, **__):
    raise KeyboardInterrupt
  monkeypatch.setattr(lean, 'save', killed, raising=False)
  with pytest.raises(KeyboardInterrupt):
    main(command)
  assert [p.name for p in tmp_path.iterdir()] == ['.small.layers']
  fails(capsys, *command, '--set', 'clip=mse', says=['another quantization', 'remove it'])
  monkeypatch.setattr(lean, 'save', saved, raising=False)
  monkeypatch.setattr('lean_jax.calibration.driver._layer', killed)      # all of them are there
  assert main([*command, '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert [p.name for p in tmp_path.iterdir()] == ['small']
  assert len(found['weights']) == 14 and {w['layer'] for w in found['weights']} == {0, 1}
  schemes = {w['name']: w['scheme'] for w in found['weights']}
  assert schemes.pop('mlp/down/kernel') == 'w8a16' and set(schemes.values()) == {'w4a16-g8'}
  assert all(0 < w['error'] < .3 for w in found['weights'])
  assert found['perplexity_after'] != found['perplexity_before'] > 1
  monkeypatch.undo()
  assert main([*command[:2], str(tmp_path / 'other'), '--scheme', 'w8a16']) == 0
  assert 'mlp/gate/kernel' in capsys.readouterr().out
  assert main([*command[:2], str(tmp_path / 'mixed'), '--budget', '6 bits', '--schemes',
               'w3a16-g8,w8a16-g8', '--calibration', str(text), '--window', '16', '--samples', '2',
               '--json']) == 0
  found = json.loads(capsys.readouterr().out)
  assert 8 * sum(w['bytes'] for w in found['weights']) <= 6 * sum(
      w['parameters'] for w in found['weights'])
  assert len({w['scheme'] for w in found['weights']}) > 1
  fails(capsys, *command[:2], tmp_path / 'no', '--budget', '6 bits', says=['--calibration'])
  fails(capsys, *command[:2], tmp_path / 'no', says=['--scheme', '--budget'])
  for wrong, says in [(['--set', 'clip'], 'NAME=VALUE'), (['--rule', 'x'], 'PATTERN=SCHEME')]:
    fails(capsys, *command[:2], tmp_path / 'no', '--scheme', 'w8a16', *wrong, says=[says])


def test_quantize_writes_other_programs_formats(folder, tmp_path, capsys):
  out = tmp_path / 'gptq'
  assert main(['quantize', str(folder), str(out), '--scheme', 'w4a16-g16', '--format', 'gptq']) == 0
  said = json.loads((out / 'config.json').read_text())['quantization_config']
  assert (said['quant_method'], said['bits'], said['group_size']) == ('gptq', 4, 16)
  capsys.readouterr()
  fails(capsys, 'quantize', folder, tmp_path / 'q', '--scheme', 'w8a8', '--format', 'ggml',
        says=['ggml', 'compressed-tensors'])


def written(capsys, *arguments):
  assert main(['generate', *(str(a) for a in arguments)]) == 0
  return capsys.readouterr().out


def test_a_stream_is_the_text(folder, capsys):
  given = folder, '--prompt', 'The quick', '--tokens', 12
  assert written(capsys, *given, '--stream') == written(capsys, *given) != 'The quick\n'


def test_settings_of_generation_reach_it(folder, tiny_model, capsys):
  how = dict(tokens=8, temperature=1.5, top_k=50, top_p=.9, min_p=.01, repetition_penalty=1.2,
             seed=3, n=3)
  flags = [x for name, value in how.items() for x in (f'--{name.replace("_", "-")}', value)]
  found = json.loads(written(capsys, folder, '--prompt', 'The', '--json', *flags))
  assert found['texts'] == tiny_model.generate('The', **how) and len(set(found['texts'])) == 3
  assert all(0 < t <= 8 for t in found['tokens']) and found['tokens_per_second'] > 0
  cut = found['texts'][0][len('The') + 1]
  shorter = json.loads(written(capsys, folder, '--prompt', 'The', '--json', *flags, '--stop', cut))
  assert shorter['texts'][0] == found['texts'][0][:found['texts'][0].index(cut, len('The'))]


def test_beams_of_the_command_line(folder, tiny_model, capsys):
  out = written(capsys, folder, '--prompt', 'The', '--tokens', 6, '--beams', 3, '--n', 2)
  assert out == '\n'.join(tiny_model.generate('The', tokens=6, beams=3, n=2)) + '\n'


def test_a_draft_on_the_command_line_changes_no_greedy_text(folder, capsys):
  given = folder, '--prompt', 'The', '--tokens', 12, '--json'
  alone, drafted = (json.loads(written(capsys, *given, *more))
                    for more in ((), ('--draft', folder)))
  assert drafted['texts'] == alone['texts']
  assert alone['drafted_kept'] is None and drafted['drafted_kept'] == 1


def test_a_cache_on_the_command_line_has_fewer_bytes(folder, capsys):
  given = folder, '--prompt', 'The', '--tokens', 50, '--json'
  floats, few = (json.loads(written(capsys, *given, '--cache', cache))['cache_bytes']
                 for cache in ('float', 'int4'))
  # Of 64 places, 2 layers and 16 channels of keys and of values. Floats: 4 bytes, and one a place.
  assert floats == 64 * (2 * 2 * 16 * 4 + 1)
  # Codes, a value's two float16 and a 32nd part of a key's; and 32 places of floats.
  assert few == 64 * (2 * (2 * 16 // 2 + 4 + 16 * 4 // 32) + 1) + 32 * 2 * 2 * 16 * 4
  assert main(['generate', str(folder), '--prompt', 'The', '--cache', 'int2']) == 2
  assert "no cache 'int2'; there are: float, int8, int4" in capsys.readouterr().err


def test_perplexity_through_a_cache_is_not_that_of_floats(folder, text, tiny_model, capsys):
  given = ['eval', str(folder), '--data', str(text), '--window', '64', '--cache', 'int4', '--json']
  assert main(given) == 0
  found = json.loads(capsys.readouterr().out)['perplexity']
  floats = lean.evaluate(tiny_model, text, window=64)['perplexity']
  assert 0 < abs(found / floats - 1) < .01


def test_a_vote_chooses_by_what_its_pattern_finds(folder, capsys):
  given = (folder, '--prompt', 'The', '--tokens', 10, '--temperature', 2, '--n', 5, '--vote',
           '([a-z])[^a-z]*$')
  found = json.loads(written(capsys, *given, '--json'))
  counts = [found['answers'].count(a) for a in found['answers']]
  assert found['answers'][found['chosen']] is not None
  assert counts[found['chosen']] == max(c for c, a in zip(counts, found['answers'])
                                        if a is not None)
  assert written(capsys, *given) == found['texts'][found['chosen']] + '\n'


def test_a_conversation_remembers_its_turns(tiny_model, tmp_path, capsys, monkeypatch):
  settings = dict(tiny_model.tokenizer.settings,
                  chat_template="{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\\n' }}"
                  "{% endfor %}{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}")
  chatty = dataclasses.replace(tiny_model, tokenizer=dataclasses.replace(
      tiny_model.tokenizer, settings=settings))
  lean.save(chatty, tmp_path / 'chat', format='hf')
  one, two = dict(role='user', content='fox'), dict(role='user', content='dog')
  start = [dict(role='system', content='jumps')]
  first = chatty.generate([*start, one], tokens=5)
  second = chatty.generate([*start, one, dict(role='assistant', content=first), two], tokens=5)
  given = tmp_path / 'chat', '--chat', '--system', 'jumps', '--tokens', 5
  monkeypatch.setattr('sys.stdin', io.StringIO('fox\n\ndog\n'))
  assert written(capsys, *given) == f'{first}\n{second}\n'
  assert written(capsys, *given, '--prompt', 'fox') == f'{first}\n'


@pytest.mark.parametrize(('flags', 'says'), [
    ([], '--prompt'),
    (['--prompt', ''], 'an empty prompt'),
    (['--prompt', 'a', '--system', 'b'], 'add --chat'),
    (['--prompt', 'a', '--chat'], 'no chat template'),
    (['--chat', '--json'], '--prompt'),
    (['--chat', '--n', '2'], '--n'),
    (['--prompt', 'a', '--vote', '('], 'regular expression'),
    (['--prompt', 'a', '--vote', 'x'], 'n above 1'),
    (['--prompt', 'a', '--tokens', '0'], '0 tokens'),
    (['--prompt', 'a', '--tokens', '-3'], '-3 tokens'),
    (['--prompt', 'a', '--tokens', '1000'], 'context has 64'),
    (['--prompt', 'a', '--temperature', '-1'], 'temperature -1'),
    (['--prompt', 'a', '--temperature', '1', '--top-k', '0'], 'top_k 0'),
    (['--prompt', 'a', '--temperature', '1', '--top-p', '0'], 'top_p 0'),
    (['--prompt', 'a', '--temperature', '1', '--min-p', '-1'], 'min_p -1'),
    (['--prompt', 'a', '--repetition-penalty', '0'], 'repetition_penalty 0'),
    (['--prompt', 'a', '--n', '2'], 'temperature 0'),
    (['--prompt', 'a', '--beams', '0'], 'beams'),
])
def test_what_cannot_be_generated_is_said_in_one_line(folder, flags, says, capsys):
  fails(capsys, 'generate', folder, *flags, says=[says])


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
  fails(capsys, 'quantize', folder, tmp_path / 'q', '--scheme', 'w7a16', says=['w7a16', 'w4a16'])
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


def test_cache_teacher_says_its_size_and_goes_on(folder, text, tmp_path, capsys):
  command = ['cache-teacher', str(folder), str(tmp_path / 'labels'), '--data', str(text), '--k',
             '12', '--window', '16']
  assert main(command) == 0
  said = capsys.readouterr().err
  assert '12 of 280: ' in said and 'an entry' in said
  names = sorted(p.name for p in (tmp_path / 'labels').iterdir())
  assert names == ['cache.json', 'labels-00000.array_record']
  assert main(command) == 0 and 'to write: 0' in capsys.readouterr().err
  fails(capsys, *command[:-3], '9', '--window', '16', says=['another k', '12', 'now 9'])


@pytest.mark.parametrize('verb', ['demo', 'run', 'info', 'eval', 'generate', 'quantize',
                                  'cache-teacher'])
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
