"""Federated distillation: processes that show no weights and no text learn from each other."""
import json

import numpy as np
import pytest

import lean_jax as lean
from lean_jax.data.windows import Windows
from lean_jax.distillation import federated
from lean_jax.experiments.federated import run_all
from lean_jax.tree import named_arrays

PRIVATE = dict(one=('jumps over the lazy dog ', 'the dog jumps over '),
               two=('the quick brown fox ', 'quick the brown fox '))
SETTINGS = dict(revisit=16, digest=24, batch=8, peak=1e-2, window=16)


def drawn(parts, seed, count=300):
  draw = np.random.default_rng(seed)
  return ''.join(draw.choice(parts, count))


@pytest.fixture(scope='module')
def run(tiny_model, tmp_path_factory):
  """A run of two clients in two processes: its folder, their first and last models."""
  folder = tmp_path_factory.mktemp('federated')
  (folder / 'public.txt').write_text(drawn(PRIVATE['one'] + PRIVATE['two'], 0))
  starts = dict(one=lean.create(tiny_model, seed=1, num_hidden_layers=1), two=lean.create(
      'lean_lstm', tiny_model.tokenizer, seed=2, hidden_size=24, num_hidden_layers=1, lstm_size=32,
      max_position_embeddings=64))
  clients = {}
  for k, (name, model) in enumerate(starts.items()):
    (folder / f'{name}.txt').write_text(drawn(PRIVATE[name], 1 + k))
    lean.save(model, folder / f'{name}-start')
    clients[name] = (folder / f'{name}-start', folder / f'{name}.txt')
  last = run_all(folder, clients, folder / 'public.txt', rounds=2, windows=24, top=8, timeout=400.,
                 **SETTINGS)
  return folder, starts, last


@pytest.mark.slow
def test_each_client_knows_public_text_better_than_alone(run):
  folder, starts, last = run
  for name, start in starts.items():
    alone = lean.train(start, folder / f'{name}.txt', steps=32, batch=8, window=16, peak=1e-2)
    nll = lambda model: lean.evaluate(model, folder / 'public.txt', window=16)['nll']
    assert nll(last[name]) < .9 * nll(alone), name


def test_what_crosses_holds_predictions_on_public_windows_alone(run):
  folder, starts, last = run
  files = [p for p in (folder / 'shared').rglob('*') if p.is_file()]
  assert sorted(str(p.relative_to(folder / 'shared')) for p in files) == [
      'agreed.json'] + [f'round-{k}/{n}.npz' for k in range(2) for n in ('average', 'one', 'two')]
  agreed = json.loads((folder / 'shared' / 'agreed.json').read_text())
  assert agreed.keys() == {'clients', 'public', 'count', 'length', 'windows', 'vocabulary', 'top',
                           'rounds', 'seed', 'weights'}
  raw = b''
  for path in files:
    raw += path.read_bytes()
    if path.suffix == '.npz':
      with np.load(path, allow_pickle=False) as found:
        assert {n: (found[n].shape, str(found[n].dtype)) for n in found.files} == dict(
            ids=((24, 15, 8), 'uint16'), log_p=((24, 15, 8), 'float16'), rest=((24, 15), 'float16'))
      # Three arrays and a zip's own headers: there is no room for anything else.
      assert path.stat().st_size < 24 * 15 * (8 * 4 + 2) + 1500
  for name in starts:                                 # no six tokens of private text in a row
    ids = starts[name].tokenizer.encode((folder / f'{name}.txt').read_text())
    for dtype in (np.uint16, np.int32):
      assert not any(ids[k:k + 6].astype(dtype).tobytes() in raw for k in range(0, 200))
    for x in (*named_arrays(starts[name].params).values(),
              *named_arrays(last[name].params).values()):
      x = np.asarray(x, np.float32).ravel()           # no four weights in a row
      if x.size >= 4 and len(set(x[:4])) > 2:
        assert x[:4].tobytes() not in raw and x[:4].astype(np.float16).tobytes() not in raw


def test_a_client_that_was_killed_goes_on_from_its_files(run, tmp_path):
  folder, starts, last = run
  again = lean.federated_client(starts['two'], folder / 'shared', 'two', folder / 'two.txt',
                                folder / 'public.txt', workdir=folder / 'two', timeout=1.,
                                **SETTINGS)
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_array_equal(again.logits(tokens), last['two'].logits(tokens))


def test_other_public_text_or_another_client_is_refused(run):
  folder, starts, _ = run
  for name, public, message in (('two', 'one.txt', 'two has public'), ('odd', 'public.txt', 'are:'),
                                ):
    with pytest.raises(lean.InputError, match=message):
      lean.federated_client(starts['two'], folder / 'shared', name, folder / 'two.txt',
                            folder / public, workdir=folder / 'odd', timeout=1., **SETTINGS)
  with pytest.raises(lean.InputError, match='of another run'):
    lean.federated_server(folder / 'shared', ['one'], folder / 'public.txt', starts['one'],
                          rounds=2, windows=24, window=16)


def test_the_average_is_the_mixture_in_float64():
  draw = np.random.default_rng(0)
  p = draw.dirichlet(np.ones(6), (2, 3, 4))                            # [clients rows T V]
  given = [federated._likeliest(np.log(one).astype(np.float32), 6) for one in p]
  found = federated.average(given, (1., 3.), 6, 6)
  np.testing.assert_allclose(np.exp(found['log_p'].astype(float)), (p[0] + 3 * p[1]) / 4, rtol=4e-3)
  # What a client does not name is spread over the rest.
  short = federated._likeliest(np.log(p[0]).astype(np.float32), 2)
  found = federated.average([short], (1.,), 6, 6)
  top = np.sort(p[0], axis=-1)[..., :-3:-1]
  want = np.concatenate([top, np.repeat((1 - top.sum(-1, keepdims=True)) / 4, 4, -1)], axis=-1)
  np.testing.assert_allclose(np.sort(np.exp(found['log_p'].astype(float)))[..., ::-1],
                             np.sort(want)[..., ::-1], rtol=4e-3)


def test_the_divergence_is_of_named_tokens_and_the_rest_in_float64():
  draw = np.random.default_rng(1)
  p, q = draw.dirichlet(np.ones(6), (2, 3, 4))
  for top in (2, 6):
    shared = federated._likeliest(np.log(p).astype(np.float32), top)
    found = federated.top_kl(np.log(q).astype(np.float32), shared['ids'].astype(np.int32),
                             shared['log_p'], shared['rest'])
    ids = np.argsort(-p, axis=-1)[..., :top]
    events = [np.take_along_axis(x, ids, axis=-1) for x in (p, q)]
    if top < 6:
      events = [np.append(x, 1 - x.sum(-1, keepdims=True), axis=-1) for x in events]
    want = np.sum(events[0] * np.log(events[0] / events[1]), axis=-1)
    np.testing.assert_allclose(found, want, atol=5e-3)                 # logs in float16


@pytest.mark.parametrize(('change', 'message'), [
    (dict(clients=['a', 'a']), 'each once'), (dict(clients=['../a']), 'each once'),
    (dict(weights=(1.,)), 'one above 0 each'), (dict(windows=99), '99 of 8 public windows'),
    (dict(top=999), 'top 999'), (dict(timeout=.1), 'did not come in')])
def test_a_server_of_what_cannot_be_is_refused(tiny_model, tmp_path, change, message):
  array = np.zeros((8, 16), np.uint16)
  public = Windows(array, array.size, 8, 1, 'abc')
  with pytest.raises(lean.InputError, match=message):
    lean.federated_server(tmp_path, public=public, like=tiny_model,
                          **dict(clients=['a', 'b'], rounds=1, windows=4) | change)


def test_a_file_of_anything_else_is_refused(tiny_model, tmp_path):
  array = np.zeros((8, 16), np.uint16)
  public = Windows(array, array.size, 8, 1, 'abc')
  (tmp_path / 'round-0').mkdir()
  np.savez(tmp_path / 'round-0' / 'a.npz', ids=np.zeros((4, 15, 2)), weights=np.zeros(3))
  with pytest.raises(lean.InputError, match='not what was agreed'):
    lean.federated_server(tmp_path, ['a'], public, tiny_model, rounds=1, windows=4, top=2)
  (tmp_path / 'round-0' / 'a.npz').write_bytes(b'no zip')
  with pytest.raises(lean.InputError, match='cannot be read'):
    lean.federated_server(tmp_path, ['a'], public, tiny_model, rounds=1, windows=4, top=2)
