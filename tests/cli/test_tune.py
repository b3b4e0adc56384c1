"""lean-jax tune: what it tries, keeps and refuses."""
import json

import pytest

from lean_jax import timing, tune
from lean_jax.cli import main
from lean_jax.kernels.grouped_matmul import tpu as ragged
from lean_jax.kernels.native import library
from lean_jax.kernels.platforms import calls, device, schedule, tuned

CASE = dict(device='v5e', op='weight_only_matmul', m=16, k=4096, n=4096, group=128, bits=4,
            experts=None)


@pytest.mark.parametrize(('flags', 'says'), [
    (['--device', 'v3', '--k', '8', '--n', '8'], 'no TPU'),
    (['--device', 'v4', '--k', '8', '--n', '8'], 'v5e, v5p, v6e'),
    (['--device', 'v5e', '--k', '8'], '--model'),
    (['--device', 'v5e', '--model', '8B', '--op', 'softmax'], 'no op'),
    (['--device', 'v5e', '--model', '8B', '--bits', '3'], '2, 4 or 8'),
    (['--device', 'v5e', '--model', '8B', '--group', '48'], 'multiples of 32'),
    (['--model', '8x7B'], 'benchmarks/grouped_matmul.py'),
    (['--k', '64', '--n', '64', '--experts', '0'], '1 or more'),
    (['--k', '64', '--n', '64', '--out', 'here.json'], 'nothing reads times')])
def test_what_cannot_be_tuned_is_said_in_one_line(flags, says, capsys):
  assert main(['tune', *flags]) == 2
  error = capsys.readouterr().err
  assert says in error and error.count('\n') == 1


@pytest.mark.parametrize('op', ['int8_matmul', 'weight_only_matmul'])
def test_without_a_device_the_forms_that_run_here_are_timed(op, capsys, monkeypatch):
  monkeypatch.setattr(timing, 'BEYOND', 1)
  assert main(['tune', '--op', op, '--k', '128', '--n', '64', '--m', '2', '3', '--json']) == 0
  rows = json.loads(capsys.readouterr().out)
  assert [r['m'] for r in rows] == [2, 3]
  for r in rows:
    assert set(r['ms']) == {'xla'} | ({'native'} if library.why_not() is None else set())
    assert set(r['ms']) | set(r['not']) == set(timing.FORMS) and 'tpu' in r['not']['pallas']
    assert r['fastest'] in r['ms'] and r['runs'] == ('native' if 'native' in r['ms'] else 'xla')


def test_the_tile_with_the_least_time_wins_and_memory_counts():
  row = lambda blocks, cycles, steps: dict(blocks=blocks, cycles=cycles, steps=steps, spills=0,
                                           unit_cycles=10, memory_cycles=1000, share=.01)
  found = [row([16, 4096, 4096], 900, 1), row([16, 512, 4096], 950, 8),
           row([16, 256, 4096], 1900, 16),
           dict(error='VMEM')]
  assert tune.best(CASE, found)['blocks'] == [16, 512, 4096]


def test_cases_share_the_tiles_that_one_has_compiled(monkeypatch):
  asked = []

  def measure(requests):
    for r in requests:
      asked.append((r['n'], r['blocks']))
      call = calls.call(r)
      yield r | dict(bundles=r['blocks'][1] + 200, spills=0, steps=call.steps(), share=.5,
                     cycles=(r['blocks'][1] + 200) * call.steps(), unit_cycles=call.operations,
                     memory_cycles=call.bytes)
  monkeypatch.setattr(schedule, 'measure', measure)
  narrow, wide = (CASE | dict(n=n) for n in (4096, 14336))
  found = list(tune.search([narrow, wide]))
  tiles = tune.candidates(wide)
  assert len(tiles) > 2 and {tuple(tile) for n, tile in asked if n == 4096} == set(tiles)
  assert [(n, tuple(tile)) for n, tile in asked if n == 14336] == [(14336, found[1]['blocks'])]
  # Its own figures, and what a search that shares nothing finds.
  for row, case in zip(found, (narrow, wide)):
    alone = tune.best(case, list(measure([case | dict(blocks=tile) for tile in tiles])))
    assert row == alone | dict(tried=len(tiles))


def test_what_is_kept_is_what_is_looked_up(tmp_path, monkeypatch):
  found = CASE | dict(blocks=[16, 256, 4096], cycles=1, memory_cycles=1, unit_cycles=1, share=.5,
                      case=tuned.case('weight_only_matmul', 'int4', 16, 4096, 4096, 128))
  tune.keep(tmp_path / 'TPU_v5_lite.json', found)
  tune.keep(tmp_path / 'TPU_v5_lite.json', found | dict(case='another'))
  monkeypatch.setattr(tuned, 'FOLDER', tmp_path)
  tuned.entries.cache_clear()
  look = lambda m: tuned.blocks('weight_only_matmul', 'int4', m, 4096, 4096, 128)
  with device.target('v5e'):
    assert look(16) == look(1) == (16, 256, 4096)
    assert look(17) == tuned.by_rule(17, 4096, 4096)
  assert len(json.loads((tmp_path / 'TPU_v5_lite.json').read_text())) == 2
  tuned.entries.cache_clear()


def test_tiles_of_experts_are_looked_up_with_how_many_they_are(tmp_path, monkeypatch):
  name = tuned.case('weight_only_matmul', 'int4', 16, 4096, 4096, 128, 8)
  case = CASE | dict(experts=8, case=name,
                     blocks=[16, 384], cycles=1, memory_cycles=1, unit_cycles=1, share=.5)
  tune.keep(tmp_path / 'TPU_v5_lite.json', case)
  monkeypatch.setattr(tuned, 'FOLDER', tmp_path)
  tuned.entries.cache_clear()
  look = lambda experts: ragged.tile('weight_only_matmul', 'int4', 16, 4096, 4096, 128, experts)
  with device.target('v5e'):
    assert look(8) == (16, 384) and look(4) == ragged.by_rule(16, 4, 4096)
  tuned.entries.cache_clear()


def test_every_tile_in_the_package_is_one_that_is_legal():
  files = list(tuned.FOLDER.glob('*.json'))
  assert files
  for file in files:
    for name, found in json.loads(file.read_text()).items():
      M, K, N, group, *experts = (int(word[1:]) for word in name.split()[2:])
      tile = tuple(found['blocks'])
      assert len(tile) == (2 if experts else 3)
      whole = tuned.fitted((*tile, K), M, K, N, group or None) if experts else None
      assert tile == (whole[:2] if experts else tuned.fitted(tile, M, K, N, group or None)), (
          file.name, name)
