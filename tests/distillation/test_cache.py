"""A teacher's labels on disk: their bytes, their error, who may read them, and runs from them."""
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lean_jax as lean
from lean_jax import files
from lean_jax.data.batches import Batches
from lean_jax.data.windows import Windows
from lean_jax.distillation import cache as caches
from lean_jax.distillation import label_codes
from lean_jax.distillation.cache import LabelledBatches, open_cache, write_cache
from lean_jax.distillation.losses import parsed, weighted
from lean_jax.distillation.start import take_layers
from lean_jax.errors import InputError
from lean_jax.training import mesh as meshes
from lean_jax.training.loop import fit

K = 12


def windows(tiny_model, count=10, length=16, seed=0):
  array = np.random.default_rng(seed).integers(0, tiny_model.config.vocabulary, (count, length),
                                               np.uint16)
  return Windows(array, array.size, array.size, 1, f'text {seed}')


def log_softmax64(x):
  x = np.asarray(x, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture(scope='module')
def cache(tiny_model, tmp_path_factory):
  """Of ten windows, in files of four."""
  said = []
  text = windows(tiny_model)
  record = sum(label_codes.codes(tiny_model.config.vocabulary, K, 15).sizes)
  folder = tmp_path_factory.mktemp('cache')
  made = write_cache(tiny_model, text, folder / 'labels', k=K, batch=3, file_bytes=4 * record,
                     say=said.append)
  assert len(said) == 1 and f'{10 * record:,} bytes in 3 files' in said[0]
  return made


@pytest.fixture(scope='module')
def student(tiny_model):
  return dict(zip(('config', 'params'), take_layers(tiny_model.config, tiny_model.params, (1,))))


def drawn(vocabulary, k, positions, seed=0, scale=3.):
  """Random labels as a teacher gives them: ids, their log-probabilities, and all V, float64."""
  rng = np.random.default_rng(seed)
  whole = log_softmax64(scale * rng.standard_normal((positions, vocabulary)))
  ids = np.argsort(-whole, axis=1)[:, :k]
  top = np.take_along_axis(whole, ids, 1)
  rest = np.take_along_axis(whole, np.argsort(-whole, axis=1)[:, k:], 1)
  tail = [np.log(np.exp(rest).sum(1, keepdims=True))] if k < vocabulary else []
  return ids, np.concatenate([top, *tail], 1), whole


@pytest.mark.parametrize(('vocabulary', 'k', 'scale'), [
    (280, 12, 3.), (280, 280, 3.), (4000, 64, 1.), (4000, 64, 12.), (131_000, 16, 6.)])
def test_labels_come_back_within_their_error(vocabulary, k, scale):
  form = label_codes.codes(vocabulary, k, 5)
  ids, log_probs, _ = drawn(vocabulary, k, 10, scale=scale)
  records = [label_codes.written(form, ids[p:p + 5], log_probs[p:p + 5]) for p in (0, 5)]
  found, read = (x.reshape(10, -1) for x in label_codes.read(form, records))
  order = np.argsort(ids, 1)
  np.testing.assert_array_equal(found, np.take_along_axis(ids, order, 1))
  want = np.concatenate([np.take_along_axis(log_probs[:, :k], order, 1), log_probs[:, k:]], 1)
  seen = want > -label_codes.RANGE
  assert np.abs(read - want)[seen].max() <= form.error + 1e-5          # float32, of sums
  assert (read[~seen] < 1 - label_codes.RANGE).all()
  np.testing.assert_allclose(np.exp(read).sum(1), 1, rtol=1e-6)
  if scale < 12:
    assert seen.all()


def test_divergences_are_within_the_bound_of_the_rounding():
  form = label_codes.codes(4000, 16, 20)
  ids, log_probs, whole = drawn(4000, 16, 20)
  ids, read = (x[0] for x in label_codes.read(form, [label_codes.written(form, ids, log_probs)]))
  kl = lambda a, b: (np.exp(a) * (a - b)).sum(1)
  log_q, log_p = (bucketed(x, ids) for x in (log_softmax64(whole + .5 * np.sin(whole)), whole))
  e = form.error
  bound = np.expm1(e) * ((np.exp(log_p) * np.abs(log_p - log_q)).sum(1) + e)
  off = np.abs(kl(read, log_q) - kl(log_p, log_q))
  assert off.max() > 0 and (off <= bound + 1e-6).all()
  assert (np.abs(kl(log_q, read) - kl(log_q, log_p)) <= e + 1e-6).all()


def bucketed(whole, ids):
  """Log-probabilities of tokens and of all others together, float64."""
  top = np.take_along_axis(whole, ids, 1)
  inside = np.zeros(whole.shape, bool)
  np.put_along_axis(inside, ids, True, 1)
  rest = np.where(inside, 0, np.exp(whole)).sum(1, keepdims=True)
  return np.concatenate([top, np.log(rest)], 1)


@pytest.mark.parametrize('k', [8, 16, 64, 256])
@pytest.mark.parametrize('vocabulary', [512, 32_000, 50_257, 65_536, 128_256, 151_936, 262_144])
def test_an_entry_takes_at_most_3_2_bytes(vocabulary, k):
  form = label_codes.codes(vocabulary, k, 511)
  each = caches.FILE // sum(form.sizes)
  whole = each * (sum(form.sizes) + 128) + (1 << 17)         # of array_record, rather too much
  assert whole / (each * 511 * k) <= 3.2
  assert form.bits >= 6 if k < 16 else form.bits >= 8


def test_files_on_disk_take_at_most_3_2_bytes_an_entry(tmp_path):
  from array_record.python.array_record_module import ArrayRecordWriter
  form = label_codes.codes(50_257, 64, 255)
  ids, log_probs, _ = drawn(50_257, 64, 3)
  record = label_codes.written(form, np.tile(ids, (85, 1)), np.tile(log_probs, (85, 1)))
  with files.replacing_path(tmp_path / 'labels') as path:
    writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for _ in range(400):
      writer.write(record)
    writer.close()
  assert (tmp_path / 'labels').stat().st_size / (400 * 255 * 64) <= 3.2


def test_the_cache_has_the_teachers_top_k_of_every_window(tiny_model, cache):
  text = windows(tiny_model)
  opened = open_cache(cache.folder)
  assert opened.header == cache.header and len(list(cache.folder.iterdir())) == 4
  ids, read = opened.labels([7, 2])
  logits = jax.jit(lambda p: tiny_model.module.apply({'params': p}, jnp.int32(text.array)[
      jnp.array([7, 2])])[0])(tiny_model.params)
  whole = log_softmax64(logits)[:, :-1].reshape(30, -1)
  ids, read = ids.reshape(30, K), read.reshape(30, K + 1)
  np.testing.assert_array_equal(ids, np.sort(np.argsort(-whole, 1)[:, :K], 1))
  np.testing.assert_allclose(read, bucketed(whole, ids), atol=cache.codes.error + 1e-4)


def losses_of(module, params, batch, losses, teacher=None):
  terms = parsed(module.config, module.config, losses)
  loss = weighted(module, () if teacher is None else module, terms)
  given = {} if teacher is None else dict(teacher_params=teacher)
  return jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None, **given), has_aux=True))(params)


KINDS = [dict(kind='forward_kl', temperature=2.), dict(kind='reverse_kl'),
         dict(kind='total_variation'), dict(kind='cross_entropy')]


def test_losses_of_a_cache_are_those_of_its_numbers(tiny_model, cache, student):
  module, params = student['config'].module, student['params']
  text = windows(tiny_model)
  batch = LabelledBatches(Batches(text, 4, 0), cache)[3]
  (total, values), _ = losses_of(module, params, batch, KINDS)
  y = jax.jit(lambda p: module.apply({'params': p}, jnp.asarray(batch['tokens']))[0])(params)
  rows = lambda x: np.asarray(x[:, :-1], np.float64).reshape(60, -1)
  q = bucketed(log_softmax64(rows(y)), rows(batch['label_ids']).astype(int))
  p = rows(batch['label_log_probs'])
  q2, p2 = log_softmax64(q / 2), log_softmax64(p / 2)
  want = dict(
      forward_kl=4 * (np.exp(p2) * (p2 - q2)).sum(1).mean(),
      reverse_kl=(np.exp(q) * (q - p)).sum(1).mean(),
      total_variation=np.abs(np.exp(q) - np.exp(p)).sum(1).mean() / 2,
      cross_entropy=-log_softmax64(rows(y))[np.arange(60),
                                            batch['tokens'][:, 1:].reshape(-1)].mean())
  for name, value in want.items():
    np.testing.assert_allclose(values[name], value, rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(total, sum(want.values()), rtol=2e-5)


@pytest.mark.slow
def test_a_step_from_the_cache_is_the_online_top_k_step(tiny_model, cache, student):
  module, params = student['config'].module, student['params']
  batch = LabelledBatches(Batches(windows(tiny_model), 8, 0), cache)[0]
  hard = dict(kind='cross_entropy', weight=.3)
  (_, cached), ours = losses_of(module, params, batch, [dict(kind='forward_kl'), hard])
  terms = parsed(module.config, tiny_model.config, [dict(kind='top_k', k=K), hard])
  loss = weighted(module, tiny_model.module, terms)
  (_, online), theirs = jax.jit(jax.value_and_grad(
      lambda p: loss(p, dict(tokens=batch['tokens']), None, teacher_params=tiny_model.params),
      has_aux=True))(params)
  e = cache.codes.error
  assert abs(cached['forward_kl'] - online['top_k']) <= np.expm1(e) * (4 + e)
  np.testing.assert_allclose(cached['cross_entropy'], online['cross_entropy'], rtol=1e-6)
  flat = lambda t: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)])
  off = np.linalg.norm(flat(ours) - flat(theirs)) / np.linalg.norm(flat(theirs))
  assert off < 2 * e


def test_of_all_tokens_it_is_the_full_divergence(tiny_model, student, tmp_path):
  module, params = student['config'].module, student['params']
  text = windows(tiny_model, 4)
  whole = write_cache(tiny_model, text, tmp_path, k=tiny_model.config.vocabulary, batch=4)
  batch = LabelledBatches(Batches(text, 4, 0), whole)[0]
  losses = [dict(kind='forward_kl', temperature=2.), dict(kind='reverse_kl', name='reverse')]
  (_, cached), _ = losses_of(module, params, batch, losses)
  loss = weighted(module, tiny_model.module, parsed(module.config, tiny_model.config, losses))
  _, online = jax.jit(lambda p, t: loss(p, dict(tokens=batch['tokens']), None, teacher_params=t))(
      params, tiny_model.params)
  e = whole.codes.error
  assert abs(cached['reverse'] - online['reverse']) <= e
  assert abs(cached['forward_kl'] - online['forward_kl']) <= 4 * np.expm1(e) * (1 + e)


def test_a_run_from_the_cache_ends_where_the_online_run_does(tiny_model, cache, student):
  module, text = student['config'].module, windows(tiny_model)
  ends = []
  for batches, losses, teachers, frozen in (
      (LabelledBatches(Batches(text, 4, 1), cache), [dict(kind='forward_kl')], (), {}),
      (Batches(text, 4, 1), [dict(kind='top_k', k=K)], tiny_model.module,
       dict(teacher_params=tiny_model.params))):
    terms = parsed(module.config, tiny_model.config, losses)
    seen = []
    fit(weighted(module, teachers, terms), student['params'], batches, optax.sgd(.3), steps=12,
        frozen=frozen, hooks=[lambda _, m, seen=seen: seen.append(float(m['loss']))])
    ends.append(np.array(seen))
  assert ends[0][-1] < .8 * ends[0][0]
  np.testing.assert_allclose(*ends, atol=2 * cache.codes.error)


@pytest.mark.slow
def test_a_run_on_a_mesh_is_the_run_on_one_device(tiny_model, cache, student):
  module, text = student['config'].module, windows(tiny_model)
  loss = weighted(module, (), parsed(module.config, module.config, KINDS))
  ends = []
  for mesh in (None, meshes.make_mesh(2, 2, 2)):
    seen = []
    fit(loss, student['params'], LabelledBatches(Batches(text, 4, 1), cache), optax.sgd(.1),
        steps=4, mesh=mesh, hooks=[lambda _, m, seen=seen: seen.append(float(m['loss']))])
    ends.append(seen)
  np.testing.assert_allclose(*ends, rtol=1e-5)


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_read_the_same_global_batch(tiny_model, cache, hosts):
  text = windows(tiny_model)
  whole = LabelledBatches(Batches(text, 4, 2), cache)[5]
  parts = [LabelledBatches(Batches(text, 4, 2), cache).part(5, slice(h, None, hosts))
           for h in range(hosts)]
  for name, x in whole.items():
    np.testing.assert_array_equal(np.stack([p[name] for p in parts], 1).reshape(x.shape), x)


def test_hosts_write_parts_that_make_up_the_same_files(tiny_model, cache, tmp_path):
  text, size = windows(tiny_model), cache.each * sum(cache.codes.sizes)
  for host in (1, 0):
    with pytest.raises(InputError, match='cache.json|files of labels are missing|holds no labels'):
      open_cache(tmp_path / 'both').labels([0])
    both = write_cache(tiny_model, text, tmp_path / 'both', k=K, batch=3, file_bytes=size,
                       host=host, hosts=2)
  assert [p.name for p in both.paths] == [p.name for p in cache.paths]
  for mine, other in zip(both.paths, cache.paths):
    assert mine.read_bytes() == other.read_bytes()


CHILD = """
import sys
import time
import numpy as np
import lean_jax as lean
from lean_jax.data.windows import Windows
from lean_jax.distillation import cache as caches
model, array, real = lean.load(sys.argv[1]), np.load(sys.argv[2]), caches.top_labels
def slow(*given):
  time.sleep(.2)
  return real(*given)
caches.top_labels = slow
caches.write_cache(model, Windows(array, array.size, array.size, 1, 'text 0'), sys.argv[3],
                   k=int(sys.argv[4]), batch=2, file_bytes=int(sys.argv[5]))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_files_that_are_missing(tiny_model, cache, tmp_path):
  text, size = windows(tiny_model), cache.each * sum(cache.codes.sizes)
  lean.save(tiny_model, tmp_path / 'model')
  np.save(tmp_path / 'text.npy', text.array)
  child = subprocess.Popen([sys.executable, '-c', CHILD, tmp_path / 'model', tmp_path / 'text.npy',
                            tmp_path / 'c', str(K), str(size)])
  while not (tmp_path / 'c' / 'labels-00000.array_record').exists() and child.poll() is None:
    time.sleep(.01)
  time.sleep(.1)
  child.kill()
  assert child.wait() < 0
  first = (tmp_path / 'c' / 'labels-00000.array_record').stat()
  with pytest.raises(InputError, match=r'no labels-0000\d.*goes on'):
    open_cache(tmp_path / 'c').labels([0])
  done = []
  write_cache(tiny_model, text, tmp_path / 'c', k=K, batch=3, file_bytes=size,
              progress=lambda n, total: done.append((n, total)))
  assert done[-1] == (6, 6)                                        # of ten, four were there
  assert (tmp_path / 'c' / 'labels-00000.array_record').stat().st_mtime_ns == first.st_mtime_ns
  names = {p.name for p in cache.folder.iterdir()}
  assert {p.name for p in (tmp_path / 'c').iterdir()} == names
  for name in names:
    assert (tmp_path / 'c' / name).read_bytes() == (cache.folder / name).read_bytes()


HOST = """
import dataclasses
import sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
import lean_jax as lean
from lean_jax.data.windows import Windows
from lean_jax.distillation import cache as caches
from lean_jax.training import mesh as meshes
model, array = lean.load(sys.argv[3]), np.load(sys.argv[4])
if sys.argv[8] == 'spread':
  mesh = meshes.make_mesh(1, 2, 2)
  host = jax.device_get(model.params)
  put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda at: x[at])
  model = dataclasses.replace(model, params=jax.tree.map(put, host, meshes.shardings(host, mesh)))
caches.write_cache(model, Windows(array, array.size, array.size, 1, 'text 0'), sys.argv[5],
                   k=int(sys.argv[6]), batch=2, file_bytes=int(sys.argv[7]))
jax.experimental.multihost_utils.sync_global_devices('done')
"""


@pytest.mark.slow
@pytest.mark.parametrize('how', ['each', 'spread'])
def test_two_processes_write_the_labels_of_one(tiny_model, cache, tmp_path, how):
  text, size = windows(tiny_model), cache.each * sum(cache.codes.sizes)
  lean.save(tiny_model, tmp_path / 'model')
  np.save(tmp_path / 'text.npy', text.array)
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = found.getsockname()[1]
  flags = dict(os.environ, XLA_FLAGS='--xla_force_host_platform_device_count=2')
  hosts = [subprocess.Popen([sys.executable, '-c', HOST, f'localhost:{port}', str(host),
                             tmp_path / 'model', tmp_path / 'text.npy', tmp_path / 'c', str(K),
                             str(size), how], env=flags) for host in (0, 1)]
  assert [host.wait(300) for host in hosts] == [0, 0]
  opened, rows = open_cache(tmp_path / 'c'), range(len(text))
  assert opened.header == cache.header
  (ids, mine), (others, theirs) = opened.labels(rows), cache.labels(rows)
  np.testing.assert_array_equal(ids, others)
  # Sums over devices in another order may round a probability to the next step.
  np.testing.assert_allclose(mine, theirs, atol=2 * cache.codes.error)
  assert {p.name for p in (tmp_path / 'c').iterdir()} == {p.name for p in cache.folder.iterdir()}


def test_what_failed_is_written_by_the_same_call(tiny_model, cache, tmp_path, monkeypatch):
  text, size = windows(tiny_model), cache.each * sum(cache.codes.sizes)
  real, calls = caches.top_labels, []

  def failing(*given):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return real(*given)
  again = lambda: write_cache(tiny_model, text, tmp_path / 'c', k=K, batch=2, file_bytes=size)
  monkeypatch.setattr(caches, 'top_labels', failing)
  with pytest.raises(KeyboardInterrupt):
    again()
  assert sorted(p.name for p in (tmp_path / 'c').iterdir()) == [
      'cache.json', 'labels-00000.array_record']                    # nothing half-written
  monkeypatch.setattr(caches, 'top_labels', real)
  again()
  for mine, other in zip(open_cache(tmp_path / 'c').paths, cache.paths):
    assert mine.read_bytes() == other.read_bytes()


def test_labels_of_something_else_are_refused_by_name(tiny_model, cache, tmp_path):
  text = windows(tiny_model)
  again = lambda m=tiny_model, t=text, k=K: write_cache(m, t, cache.folder, k=k)
  for call, says in (
      (lambda: again(k=K + 1), f'another k \\({K}, now {K + 1}\\)'),
      (lambda: again(t=windows(tiny_model, seed=1)), r'another windows \(text 0, now text 1\)'),
      (lambda: again(m=dataclasses.replace(tiny_model, params=jax.tree.map(
          lambda x: x + 1, tiny_model.params))), 'another teacher'),
      (lambda: write_cache(tiny_model, text, tmp_path, k=0), 'k 0'),
      (lambda: write_cache(tiny_model, text, tmp_path, k=9999), 'give 1 to'),
      (lambda: label_codes.codes(128_256, 1, 5), 'give 4 or more'),
      (lambda: write_cache(tiny_model, windows(tiny_model, length=65), tmp_path), '65.*64'),
      (lambda: write_cache(tiny_model, text, tmp_path, batch=0), '0 windows at a time')):
    with pytest.raises(InputError, match=says):
      call()
  reads = lambda config=tiny_model.config, tokenizer=tiny_model.tokenizer, t=text: (
      caches.check_labels(cache, config, tokenizer, t))
  reads()
  for call, says in (
      (lambda: reads(tokenizer=dataclasses.replace(tiny_model.tokenizer, bos=5)),
       f'another tokenizer.*{tiny_model.tokenizer.fingerprint}'),
      (lambda: reads(dataclasses.replace(tiny_model.config, vocabulary=300)),
       'another vocabulary.*280.*300|another vocabulary'),
      (lambda: reads(t=windows(tiny_model, length=8)), r'window length \(16.*8'),
      (lambda: reads(t=windows(tiny_model, seed=1)), r'windows \(text 0.*text 1')):
    with pytest.raises(InputError, match=says):
      call()


def test_a_disk_too_small_is_said_before_the_work(tiny_model, tmp_path, monkeypatch):
  monkeypatch.setattr(caches.shutil, 'disk_usage', lambda _: type('U', (), dict(free=1000)))
  with pytest.raises(InputError, match='need .* bytes and the disk .* has 1,000'):
    write_cache(tiny_model, windows(tiny_model), tmp_path / 'c')
  assert not list((tmp_path / 'c').iterdir())


def caches_record(cache, row):
  return cache._records.__getitems__([row])[0]


def test_damaged_caches_are_named(tiny_model, cache, tmp_path):
  with pytest.raises(InputError, match='holds no labels.*cache_teacher'):
    open_cache(tmp_path)
  header = json.loads((cache.folder / 'cache.json').read_text())
  for damaged, says in (('{', 'no description'), ('[]', 'no description'),
                        (json.dumps(dict(header, odd=1)), 'odd'),
                        (json.dumps(dict(header, format=0)), 'format 0.*reads 1')):
    (tmp_path / 'cache.json').write_text(damaged)
    with pytest.raises(InputError, match=says):
      open_cache(tmp_path)
  (tmp_path / 'cache.json').write_text(json.dumps(header))
  for path in cache.paths:
    (tmp_path / path.name).write_bytes(path.read_bytes())
  last = tmp_path / cache.paths[-1].name
  last.write_bytes(last.read_bytes()[:70_000])
  with pytest.raises(InputError, match=last.name + ' is damaged.*the other files stay'):
    open_cache(tmp_path).labels([0])
  whole = bytearray(cache.paths[-1].read_bytes())
  whole[whole.index(caches_record(cache, 9)) + 5] ^= 1
  last.write_bytes(whole)
  open_cache(tmp_path).labels([0])
  with pytest.raises(InputError, match=last.name + ' is damaged'):
    open_cache(tmp_path).labels([9])
  last.write_bytes(cache.paths[0].read_bytes())
  with pytest.raises(InputError, match='of 12 windows and should of 10'):
    open_cache(tmp_path).labels([9])
  form = cache.codes
  with pytest.raises(InputError, match='record of 3 bytes'):
    label_codes.read(form, [b'abc'])
  with pytest.raises(InputError, match='another number of tokens'):
    label_codes.read(form, [b'\xff' * sum(form.sizes)])
  with pytest.raises(InputError, match='no numbers'):
    label_codes.written(form, np.tile(np.arange(K), (15, 1)), np.full((15, K + 1), np.nan))


def test_distill_reads_a_cache_in_place_of_its_teacher(tiny_model, tmp_path):
  (tmp_path / 'text.txt').write_text('the old fox sees the lazy dog\n' * 200)
  text, folder = tmp_path / 'text.txt', tmp_path / 'labels'
  made = lean.cache_teacher(tiny_model, text, folder, k=K, window=16, batch=16)
  student = dict(zip(('config', 'params'), take_layers(tiny_model.config, tiny_model.params, (0,))))
  small = dataclasses.replace(tiny_model, **student)
  losses = [dict(kind='reverse_kl'), dict(kind='cross_entropy', weight=.5)]
  run = lambda **given: lean.distill(
      given.pop('teacher', None), text, **dict(student=small, cache=folder, losses=losses, steps=4,
                                               batch=4, peak=1e-2, decay='constant') | given)
  one = run(workdir=tmp_path / 'run', log_every=1)
  two = run(teacher=tiny_model, cache=made, student=None, keep=1)
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
  rows = [json.loads(r) for r in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
  assert rows[-1]['loss'] < rows[0]['loss'] and {'reverse_kl', 'cross_entropy'} <= set(rows[0])
  for given, says in (
      (dict(losses=[dict(kind='hidden')]), 'hidden looks at layers.*labels alone'),
      (dict(losses=[dict(kind='top_k', k=2)]), 'top_k of a cache'),
      (dict(cache=None), 'no teacher'), (dict(student=None), 'no teacher'),
      (dict(teacher=small), 'of the teacher'), (dict(teacher=[small, small]), '2 teachers'),
      (dict(window=8), r'window length \(16.*8')):
    with pytest.raises(InputError, match=says):
      run(**given)
