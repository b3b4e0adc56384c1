import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lean_jax import files
from lean_jax.errors import InputError
from lean_jax.quantization.ema import ema
from lean_jax.quantization.lsq import lsq, lsq_plus
from lean_jax.quantization.pact import pact
from lean_jax.quantization.spec import parse_spec
from lean_jax.training import stored
from lean_jax.training.checkpoint import Checkpoints, load_model, read_card, save_model
from lean_jax.training.digest import digest
from lean_jax.weights import Dense, FakeQuantized, LowRank, Quantized

AXES = ('embed', 'mlp')


def dense(seed, dtype=jnp.float32):
  return Dense(jax.random.normal(jax.random.key(seed), (128, 16), dtype), 'io', AXES)


def quantized(seed, spec):
  return Quantized.of(dense(seed).value, parse_spec(spec), 'io', AXES)


def model():
  """Every kind of weight, wrapped and not, and plain arrays of few bits."""
  return {'plain': {'kernel': dense(0)},
          'four': {'kernel': quantized(1, 'w4a16-g64')},
          'two': {'kernel': quantized(2, 'w2a16-g64')},
          'low': {'kernel': LowRank(quantized(3, 'w4a16-g64'), jnp.ones((128, 2)),
                                    jnp.zeros((2, 16)), 2.)},
          'fake': {'kernel': FakeQuantized(dense(4, jnp.bfloat16), parse_spec('w4a16-g64'))},
          'step': {'kernel': lsq(dense(5), 'w4a16-g64')},
          'offset': {'kernel': lsq_plus(dense(6), 'w2a16-g64')},
          'clip': {'kernel': pact(FakeQuantized(dense(7), parse_spec('w8a8')), 6.)},
          'range': {'kernel': ema(lsq(dense(8), 'w8a8'), .99)},
          'int4': jnp.arange(-8, 8).astype(jnp.int4), 'fp8': jnp.ones(3, jnp.float8_e4m3fn)}


def train_state(seed=0):
  """Parameters of which some live in another tree, and an optimizer's state with a key."""
  train = {'up': dense(seed), 'down': Dense(None, 'io', AXES), 'norm': {'scale': jnp.ones(16)}}
  return train, (optax.adamw(1e-3).init(train), {'key': jax.random.key(seed)}, optax.EmptyState())


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and digest(a) == digest(b)


def save_steps(folder, steps, **kw):
  with Checkpoints(folder, every=1, **kw) as checkpoints:
    for step in steps:
      assert checkpoints.save(step, *train_state(step), {'step': step})


def data_file(folder, item):
  """The file that holds an item's arrays."""
  return max((folder / item / 'd').iterdir(), key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-20])


DAMAGE = {
    'bit of an array': lambda f: flip(data_file(f, 'params')),
    'truncated array': lambda f: truncate(data_file(f, 'params')),
    'array missing': lambda f: data_file(f, 'params').unlink(),
    'bit of the optimizer': lambda f: flip(data_file(f, 'opt')),
    'optimizer missing': lambda f: shutil.rmtree(f / 'opt'),
    'bit of the meta': lambda f: flip(f / 'meta' / 'metadata'),
    'meta missing': lambda f: shutil.rmtree(f / 'meta'),
    'all missing': lambda f: [shutil.rmtree(p) for p in f.iterdir() if p.is_dir()]}


def test_training_state_comes_back(tmp_path):
  save_steps(tmp_path / 'run', (1, 2, 3))
  train, opt = train_state()
  with Checkpoints(tmp_path / 'run', every=1) as checkpoints:
    step, *trees, meta = checkpoints.restore(train, opt)
    assert (step, meta) == (3, {'step': 3})
    assert same(trees, list(train_state(3)))
    assert checkpoints.restore(train, opt, step=2)[0] == 2
    with pytest.raises(InputError, match=r'no checkpoint of step 1 .* \[2, 3\]'):
      checkpoints.restore(train, opt, step=1)


def test_every_kind_of_weight_comes_back(tmp_path):
  params = model()
  with Checkpoints(tmp_path, every=1) as checkpoints:
    checkpoints.save(1, params, (), {})
    assert same(checkpoints.restore(jax.eval_shape(lambda: params), ())[1], params)


def test_saves_at_its_interval_or_when_forced(tmp_path):
  with Checkpoints(tmp_path, every=2, keep=9) as checkpoints:
    state = train_state()
    assert [s for s in range(1, 6) if checkpoints.save(s, *state, {})] == [2, 4]
    assert checkpoints.save(5, *state, {}, force=True)
    assert not checkpoints.save(5, *state, {}, force=True)      # it is there
    checkpoints.wait()
    assert checkpoints.latest() == 5


def test_donated_arrays_were_saved_before(tmp_path):
  update = jax.jit(lambda t: jax.tree.map(lambda x: x * 1.5 + 1, t), donate_argnums=0)
  state = {str(n): jnp.arange(n, dtype=jnp.float32) for n in (1, 100, 50000)}
  saved = {}
  with Checkpoints(tmp_path, every=1, keep=9) as checkpoints:
    for step in range(1, 6):
      saved[step] = digest(jax.tree.map(jnp.copy, state))
      checkpoints.save(step, state, {}, {})
      state = update(update(state))
    for step, expected in saved.items():
      assert digest(checkpoints.restore(state, {}, step=step)[1]) == expected


def test_onto_another_sharding(tmp_path):
  def on(shape, spec):
    mesh = jax.make_mesh(shape, ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
    return jax.device_put(dense(1), NamedSharding(mesh, PartitionSpec(*spec)))
  one, other = on((8, 1), ('x',)), on((2, 4), ('y', 'x'))
  with Checkpoints(tmp_path, every=1) as checkpoints:
    checkpoints.save(1, {'w': one}, {}, {})
    back = checkpoints.restore({'w': other}, {})[1]
  assert digest(back) == digest({'w': one})
  assert back['w'].value.sharding == other.value.sharding


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path):
  save_steps(tmp_path, (1, 2))
  DAMAGE[damage](tmp_path / '2')
  said = []
  with Checkpoints(tmp_path, every=1, warn=said.append) as checkpoints:
    step, *trees, meta = checkpoints.restore(*train_state())
    assert step == 1 == meta['step']
    assert same(trees, list(train_state(1)))
    assert len(said) == 1
    assert 'step 2:' in said[0]
    assert checkpoints.save(2, *train_state(2), {'step': 2})     # in the place of the damaged one
    assert checkpoints.restore(*train_state())[0] == 2


def test_when_all_are_damaged_it_says_of_each_why(tmp_path):
  save_steps(tmp_path, (1, 2))
  flip(data_file(tmp_path / '1', 'params'))
  shutil.rmtree(tmp_path / '2' / 'opt')
  with pytest.raises(InputError, match=r'step 2: opt: .*; step 1: params: '):
    Checkpoints(tmp_path, every=1).restore(*train_state())


def test_another_model_or_optimizer_is_an_error(tmp_path):
  save_steps(tmp_path, (1, 2))
  train, opt = train_state()
  cast = train | {'up': dense(0, jnp.bfloat16)}
  kind = train | {'up': FakeQuantized(dense(0), parse_spec('w4a16-g64'))}
  less = {'up': train['up']}
  for bad, what in ((cast, 'up/value.*float32.*bfloat16'), (kind, 'up'), (less, 'norm')):
    with pytest.raises(InputError, match=f'2/params.*{what}'):
      Checkpoints(tmp_path, every=1).restore(bad, opt)
  with pytest.raises(InputError, match='2/opt'):
    Checkpoints(tmp_path, every=1).restore(train, optax.sgd(1e-3).init(train))


def test_checkpoints_of_another_run_are_not_mixed_in(tmp_path):
  save_steps(tmp_path, (10,))
  with pytest.raises(InputError, match=r'steps \[10\] that this run did not restore'):
    Checkpoints(tmp_path, every=1).save(5, *train_state(), {})
  assert Checkpoints(tmp_path, every=1).latest() == 10


def test_without_checkpoints(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'none', every=1)
  assert checkpoints.latest() is None
  with pytest.raises(InputError, match='it has none'):
    checkpoints.restore({}, {})
  assert not (tmp_path / 'none').exists()
  with pytest.raises(InputError, match='every 0'):
    Checkpoints(tmp_path, every=0)


@pytest.mark.parametrize('ask', ['wait', 'save', 'close'])
def test_a_full_disk_is_told_and_the_one_before_stays(ask, tmp_path, monkeypatch):
  save_steps(tmp_path, (1,))
  checkpoints = Checkpoints(tmp_path, every=1, keep=1)
  checkpoints.restore(*train_state())

  def fail(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')
  with monkeypatch.context() as patch:
    patch.setattr(ocp.StandardCheckpointHandler, 'finalize', fail)
    checkpoints.save(2, *train_state(2), {})
    with pytest.raises(InputError, match='no space left'):
      checkpoints.save(3, *train_state(3), {}) if ask == 'save' else getattr(checkpoints, ask)()
  assert os.listdir(tmp_path) == ['1']
  assert checkpoints.save(3, *train_state(3), {})
  checkpoints.close()
  assert os.listdir(tmp_path) == ['3']


CHILD = '''
import sys
import jax.numpy as jnp
from lean_jax.training.checkpoint import Checkpoints
like = {'w': jnp.zeros(1 << 19)}
with Checkpoints(sys.argv[1], every=1) as checkpoints:
  first, params = 0, like
  if checkpoints.latest():
    first, params, _, _ = checkpoints.restore(like, {})
  for step in range(first + 1, 1000):
    params = {'w': params['w'] + 1}
    checkpoints.save(step, params, {}, {'step': step})
'''


def kill_in_a_save(folder, more, delay=0.):
  """SIGKILLs a run `delay` seconds after it has started its `more`th save."""
  first = Checkpoints(folder, every=1).latest() or 0
  child = subprocess.Popen([sys.executable, '-c', CHILD, folder],
                           env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)})
  steps = lambda: (p.name.partition('.')[0] for p in pathlib.Path(folder).iterdir())
  deadline = time.monotonic() + 600
  # A save that was too quick to be seen counts too: the next one is under way.
  while not any(int(step) >= first + more for step in steps() if step.isdecimal()):
    assert child.poll() is None
    assert time.monotonic() < deadline
    time.sleep(.0005)
  time.sleep(delay)
  child.send_signal(signal.SIGKILL)
  child.wait()


def check_killed(folder):
  checkpoints = Checkpoints(folder, every=1, warn=pytest.fail)
  step, params, _, meta = checkpoints.restore({'w': jnp.zeros(1 << 19)}, {})
  assert step == checkpoints.latest() == meta['step']
  assert (params['w'] == step).all()
  return step


def test_a_killed_run_goes_on_from_its_newest(tmp_path):
  folder = str(tmp_path)
  kill_in_a_save(folder, more=2)
  first = check_killed(folder)
  kill_in_a_save(folder, more=2, delay=.02)
  assert check_killed(folder) > first


@pytest.mark.slow
def test_runs_killed_at_many_moments_go_on(tmp_path):
  for k in range(20):
    kill_in_a_save(str(tmp_path), more=2 + k % 3, delay=.005 * k)
    check_killed(str(tmp_path))


def test_a_model_comes_back(tmp_path):
  params = model()
  save_model(tmp_path / 'm', params, {'name': 'tiny', 'layers': (1, 2)})
  back, meta = load_model(tmp_path / 'm')
  assert same(back, params)
  assert meta == {'name': 'tiny', 'layers': [1, 2]}
  assert read_card(tmp_path / 'm')['params']['tree']['two']['tree']['kernel']['spec'] == 'w2a16-g64'
  assert sorted(os.listdir(tmp_path / 'm')) == ['lean.json', 'params']
  assert os.listdir(tmp_path) == ['m']


def test_a_model_onto_shardings(tmp_path):
  save_model(tmp_path / 'm', {'w': dense(1)}, {})
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
  split = NamedSharding(mesh, PartitionSpec('x'))
  for where in (split, {'w': split}, lambda like: jax.tree.map(lambda _: split, like)):
    back = load_model(tmp_path / 'm', shardings=where)[0]
    assert back['w'].value.sharding == split
    assert same(back, {'w': dense(1)})


def test_packed_weights_take_their_bytes_on_disk(tmp_path):
  w = Quantized.of(jax.random.normal(jax.random.key(0), (1024, 256)), parse_spec('w4a16-g64'),
                   'io', AXES)
  save_model(tmp_path / 'm', {'w': w}, {})
  disk = sum(p.stat().st_size for p in tmp_path.rglob('*') if p.is_file())
  assert disk < 1.05 * sum(x.nbytes for x in jax.tree.leaves(w))


def reseal(folder, **changes):
  document = json.loads((folder / 'lean.json').read_text()) | changes
  del document['sha256']
  (folder / 'lean.json').write_text(json.dumps(
      document | {'sha256': stored._checksum(document)}))


@pytest.mark.parametrize(('damage', 'message'), [
    (lambda f: shutil.rmtree(f), 'holds no model: lean.json is not there'),
    (lambda f: (f / 'lean.json').unlink(), 'holds no model: lean.json is not there'),
    (lambda f: (f / 'lean.json').write_text('{"a": '), 'is damaged: lean.json: JSONDecodeError'),
    (lambda f: (f / 'lean.json').write_text('[]'), 'is damaged: lean.json'),
    (lambda f: (f / 'lean.json').write_bytes(b'\xff\xfe'), 'is damaged: lean.json'),
    (lambda f: flip(f / 'lean.json'), 'is damaged: lean.json'),
    (lambda f: reseal(f, version=99), 'is in version 99.*update lean_jax'),
    (lambda f: flip(data_file(f, 'params')), 'is damaged: params.*copy or make it again'),
    (lambda f: truncate(data_file(f, 'params')), 'is damaged: params'),
    (lambda f: data_file(f, 'params').unlink(), 'is damaged: params'),
    (lambda f: shutil.rmtree(f / 'params'), 'is damaged: params')])
def test_a_damaged_model_is_one_line(damage, message, tmp_path):
  save_model(tmp_path / 'm', {'w': dense(1), 'q': quantized(2, 'w4a16-g64')}, {})
  damage(tmp_path / 'm')
  with pytest.raises(InputError, match=message) as e:
    load_model(tmp_path / 'm')
  assert '\n' not in str(e.value)
  assert str(tmp_path / 'm') in str(e.value)


def test_an_array_stored_in_another_dtype_is_not_cast(tmp_path):
  save_model(tmp_path / 'm', {'w': jnp.zeros(4, jnp.int8)}, {})
  reseal(tmp_path / 'm', params={'tree': {'w': {'shape': [4], 'dtype': 'float32'}}})
  with pytest.raises(InputError, match=r'w is stored as int8 \(4,\), expected float32'):
    load_model(tmp_path / 'm')


def test_an_array_of_another_digest_is_named(tmp_path):
  save_model(tmp_path / 'm', {'v': jnp.ones(3), 'w': jnp.ones(4)}, {})
  reseal(tmp_path / 'm', digests=digest({'v': jnp.ones(3), 'w': jnp.zeros(4)}))
  with pytest.raises(InputError, match='params: w is not what was saved;'):
    load_model(tmp_path / 'm')


def test_overwriting_is_asked_for_and_only_of_models(tmp_path):
  save_model(tmp_path / 'm', {'w': dense(1)}, {})
  with pytest.raises(InputError, match='is there already'):
    save_model(tmp_path / 'm', {'w': dense(2)}, {})
  save_model(tmp_path / 'm', {'w': dense(2)}, {}, overwrite=True)
  assert same(load_model(tmp_path / 'm')[0], {'w': dense(2)})
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'thesis.tex').write_text('years of work')
  with pytest.raises(InputError, match='holds no model of lean_jax'):
    save_model(tmp_path / 'other', {'w': dense(2)}, {}, overwrite=True)
  assert sorted(os.listdir(tmp_path)) == ['m', 'other']


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
  save_model(tmp_path / 'm', {'w': dense(1)}, {})

  def fail(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(ocp.StandardCheckpointer, 'save', fail)
  with pytest.raises(InputError, match='no space left'):
    save_model(tmp_path / 'm', {'w': dense(2)}, {}, overwrite=True)
  assert same(load_model(tmp_path / 'm')[0], {'w': dense(1)})
  assert os.listdir(tmp_path) == ['m']


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
  target = tmp_path / 'f'
  target.mkdir()                                       # empty: counts as none
  with files.replace_folder(target) as new:
    (new / 'a').write_text('1')
    assert not any(target.iterdir())
  with (pytest.raises(ZeroDivisionError),
        files.replace_folder(target, overwrite=True) as new):
    raise ZeroDivisionError
  assert os.listdir(tmp_path) == ['f']
  assert os.listdir(target) == ['a']


def test_what_a_killed_process_left_is_cleaned_or_put_back(tmp_path):
  (tmp_path / '.f.new-00000000').mkdir()
  (tmp_path / '.f.old-00000000').mkdir()               # killed between two renames
  (tmp_path / '.f.old-00000000' / 'a').write_text('1')
  with pytest.raises(InputError, match='is there already'), files.replace_folder(tmp_path / 'f'):
    pass
  assert os.listdir(tmp_path / 'f') == ['a']
  with files.replace_folder(tmp_path / 'f', overwrite=True):
    assert not (tmp_path / '.f.new-00000000').exists()
    with files.replace_folder(tmp_path / 'f', overwrite=True):   # does not take the other's away
      assert len(list(tmp_path.glob('.f.new-*'))) == 2
  assert os.listdir(tmp_path) == ['f']


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'new' / 'a.txt'
  files.write_text(path, 'ä')

  def fail(_):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(os, 'fsync', fail)
  with pytest.raises(InputError, match='no space left'):
    files.write_text(path, 'b')
  assert path.read_text(encoding='utf-8') == 'ä'
  assert os.listdir(path.parent) == ['a.txt']
  with pytest.raises(InputError, match='cannot be written'):
    files.write_text(path / 'below', 'c')
