"""Several processes on one mesh: they compute what one does, and go on after whatever ends them."""
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from lean_jax import peers
from lean_jax.errors import InputError
from lean_jax.training import hosts
from lean_jax.training.checkpoint import load_model
from tests.training import host_worker
from tests.training.hosts_run import (
  LIMIT,
  ended,
  finished,
  launch,
  lines,
  losses,
  params,
  reaches,
  ulps,
  until,
)

MESH = dict(data=2, fsdp=2, tensor=2)
STOPS = 45                             # seconds: a heartbeat of 10, and what ending takes


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """One process and one device: the losses, and the parameters in the end."""
  folder = tmp_path_factory.mktemp('alone')
  trained = host_worker.run(dict(workdir=str(folder), steps=6, mesh={}))
  return losses(folder), [np.asarray(x) for x in jax.tree.leaves(trained)]


def same(folder, alone):
  """Within what sums in another order differ by, which Adam's first steps make larger."""
  np.testing.assert_allclose(losses(folder), alone[0], rtol=1e-5)
  for ours, wanted in zip(params(folder), alone[1], strict=True):
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_two_hosts_of_which_one_dies_and_all_start_again_compute_what_one_does(
    cache, alone, tmp_path):
  given = dict(workdir=str(tmp_path), steps=6, mesh=MESH, save_every=3)
  processes = launch(cache, 2, given | dict(die=[1, 5, 3]))
  assert processes[1].wait(timeout=LIMIT) == -signal.SIGKILL
  died = time.monotonic()
  (code, said), _ = ended(processes)
  assert time.monotonic() - died < STOPS and code != 0, said
  assert not (tmp_path / 'params.npz').exists()
  assert (tmp_path / 'checkpoints' / '3').is_dir()
  finished(launch(cache, 2, given | dict(model=str(tmp_path / 'model'))))
  same(tmp_path, alone)
  for saved, wanted in zip(jax.tree.leaves(load_model(tmp_path / 'model')[0]), params(tmp_path),
                           strict=True):
    np.testing.assert_array_equal(saved, wanted)


def test_hosts_with_other_settings_all_say_what_differs(cache, tmp_path):
  given = dict(workdir=str(tmp_path), mesh=MESH)
  found = ended(launch(cache, 2, [dict(given, steps=6), dict(given, steps=7)]))
  assert [code for code, _ in found] == [2, 2]
  for _, said in found:
    assert 'disagree on the training run' in said
    assert 'steps is 6 on host 0, 7 on host 1' in said
  assert not list(tmp_path.glob('checkpoints/*'))


@pytest.mark.parametrize(('flags', 'match'), [
    (dict(hosts=2), 'without coordinator or host'), (dict(hosts=2, host=0), 'without coordinator'),
    (dict(hosts='auto', host=0), 'finds the coordinator'),
    (dict(hosts=2, host=2, coordinator='localhost:1'), 'host 2 of 2; expected 0 to 1'),
    (dict(hosts=1, host=0, coordinator='localhost:1', heartbeat=0), 'heartbeat of 0')])
def test_settings_of_hosts_that_miss_each_other(flags, match):
  with pytest.raises(InputError, match=match):
    hosts.start(flags.pop('hosts'), **flags)


@pytest.mark.parametrize(('flags', 'match'), [
    (['--host', '0'], 'without --hosts'), (['--hosts', 'some'], "expected a number, or 'auto'")])
def test_flags_of_hosts_that_miss_each_other(flags, match):
  import argparse
  parser = argparse.ArgumentParser()
  peers.add_arguments(parser)
  assert parser.parse_args([]).heartbeat == hosts.HEARTBEAT
  with pytest.raises(InputError, match=match):
    peers.start(parser.parse_args(flags))


def test_one_process_agrees_with_itself():
  hosts.agree('config', dict(a=1))
  assert hosts.of_first([1, 'two']) == [1, 'two'] and hosts.of_any(None) is None
  assert hosts.first() and not hosts.several() and not hosts.asked_to_stop()


@pytest.mark.slow
def test_four_hosts_compute_what_one_does(cache, alone, tmp_path):
  finished(launch(cache, 4, dict(workdir=str(tmp_path), steps=6, mesh=MESH)))
  same(tmp_path, alone)


@pytest.mark.slow
def test_a_teacher_on_devices_of_its_own_of_each_host_teaches_the_same(cache, alone, tmp_path):
  given = dict(workdir=str(tmp_path), steps=6, mesh=dict(data=2, fsdp=2))
  finished(launch(cache, 2, given | dict(apart=dict(fsdp=2, tensor=2))))
  same(tmp_path, alone)
  found = ended(launch(cache, 2, given | dict(workdir=str(tmp_path / 'b'), apart=dict(tensor=2))))
  assert all('no device of host 1' in said for _, said in found), found


@pytest.mark.slow
@pytest.mark.parametrize('whose', [0, 1])
def test_hosts_wait_for_the_slowest_compiler(whose, cache, alone, tmp_path):
  """Longer than the half minute that collectives of CPUs wait for each other."""
  finished(launch(cache, 2, dict(workdir=str(tmp_path), steps=6, mesh=MESH, late=[whose, 45])))
  same(tmp_path, alone)


@pytest.fixture(scope='module')
def uninterrupted(cache, tmp_path_factory):
  """A run of two hosts that nothing ends: its settings and its losses."""
  folder = tmp_path_factory.mktemp('uninterrupted')
  given = dict(steps=40, mesh=MESH, save_every=2)
  finished(launch(cache, 2, given | dict(workdir=str(folder))))
  return given, losses(folder)


def saving(folder, since):
  """Whether there is a checkpoint that is not finished, and not of a run before."""
  for path in folder.glob('checkpoints/*-tmp*'):
    try:
      if path.stat().st_mtime > since:
        return True
    except FileNotFoundError:                          # it is finished now
      pass
  return False


@pytest.mark.slow
def test_runs_killed_at_twenty_moments_end_with_the_losses_of_an_uninterrupted_one(
    cache, uninterrupted, tmp_path):
  given, wanted = uninterrupted
  given = dict(given, workdir=str(tmp_path), sleep=.1)
  random, killed, reached = np.random.default_rng(0), 0, []
  while killed < 20:
    before = lines(tmp_path)[-1]['step'] if (tmp_path / 'metrics.jsonl').exists() else 0
    reached.append(before)
    if before > len(wanted) - 8:                       # near its end: another run
      finished(launch(cache, 2, given))
      np.testing.assert_array_equal(losses(tmp_path), wanted)
      shutil.rmtree(tmp_path)
      tmp_path.mkdir()
      continue
    processes, began = launch(cache, 2, given), time.time()
    if killed % 2:                                     # mid-save, one way or another
      alive = until(processes, lambda began=began: saving(tmp_path, began))
    else:
      alive = until(processes, lambda wanted=before + 3: reaches(tmp_path, wanted))
    assert alive, ended(processes)
    time.sleep(random.uniform(0, .4) if killed % 2 == 0 else random.uniform(0, .02))
    processes[random.integers(2)].send_signal(signal.SIGKILL)
    died = time.monotonic()
    codes = [code for code, _ in ended(processes)]
    assert time.monotonic() - died < STOPS
    assert 0 not in codes
    killed += 1
  finished(launch(cache, 2, given))
  np.testing.assert_array_equal(losses(tmp_path), wanted)
  assert len(set(reached)) > 3                         # it went on


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'devices', 'mesh'), [
    (4, 2, MESH), (1, 8, MESH), (1, 4, dict(fsdp=2, tensor=2)), (1, 1, {}),
    (2, 1, dict(data=2))], ids=str)
def test_on_other_hosts_and_devices_it_goes_on(count, devices, mesh, cache, uninterrupted,
                                               tmp_path):
  given, wanted = uninterrupted
  given = dict(given, workdir=str(tmp_path), save_every=4)
  finished(launch(cache, 2, given | dict(steps=40, die=None, stop_at=20)))
  assert losses(tmp_path).size == 20
  finished(launch(cache, count, given | dict(mesh=mesh, sleep=0), devices=devices))
  found = losses(tmp_path)
  np.testing.assert_array_equal(found[:20], wanted[:20])
  steps = np.arange(1, 21)
  assert (ulps(found[20:], wanted[20:]) <= 4 * steps).all(), ulps(found[20:], wanted[20:])
  if count == 4:                                       # the same mesh: the same sums
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize('whom', [0, 1])
def test_a_preempted_host_stops_all_at_one_step_with_one_save(whom, cache, uninterrupted, tmp_path):
  given, wanted = uninterrupted
  given = dict(given, workdir=str(tmp_path), save_every=100)
  processes = launch(cache, 2, given | dict(sleep=.1))
  assert until(processes, lambda: reaches(tmp_path, 5))
  processes[whom].send_signal(signal.SIGTERM)
  said = finished(processes)
  at = losses(tmp_path).size
  assert all(f'stopped after step {at} of 40; saved' in x for x in said)
  assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == [str(at)]
  finished(launch(cache, 2, given))
  np.testing.assert_array_equal(losses(tmp_path), wanted)


def damage_truncate(path):
  path.write_bytes(path.read_bytes()[:-20])


def damage_flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize('damage', [damage_truncate, damage_flip, lambda path: path.unlink()],
                         ids=['truncated', 'flipped', 'missing'])
def test_all_hosts_pass_over_what_is_damaged(damage, cache, uninterrupted, tmp_path):
  given, wanted = uninterrupted
  given = dict(given, workdir=str(tmp_path))
  finished(launch(cache, 2, given | dict(stop_at=20)))
  files = (tmp_path / 'checkpoints' / '20' / 'params' / 'd').iterdir()   # of all hosts, merged
  damage(max(files, key=lambda p: p.stat().st_size))
  said = finished(launch(cache, 2, given))
  assert 'step 20:' in said[0] and 'went back to step 18' in said[0]
  assert 'went back' not in said[1]
  np.testing.assert_array_equal(losses(tmp_path), wanted)


@pytest.mark.slow
def test_a_full_disk_ends_all_hosts_and_the_checkpoint_before_stays(cache, uninterrupted, tmp_path):
  given, wanted = uninterrupted
  given = dict(given, workdir=str(tmp_path))
  found = ended(launch(cache, 2, given | dict(full_at=[10, 8])))
  assert [code for code, _ in found] == [2, 2], found
  assert 'no space left on the disk' in found[0][1]
  assert 'cannot be written by host 0: OSError' in found[1][1]
  assert max(int(p.name) for p in (tmp_path / 'checkpoints').glob('*') if p.name.isdecimal()) == 8
  finished(launch(cache, 2, given))
  np.testing.assert_array_equal(losses(tmp_path), wanted)
