import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from lean_jax.data import windows
from lean_jax.data.sources import TextFiles
from lean_jax.data.tokenizer import Tokenizer, train_bpe
from lean_jax.data.windows import pack
from lean_jax.errors import InputError

TEXTS = [f'document {i} ☂ of words\n' * (i + 1) for i in range(20)]


@pytest.fixture(scope='module')
def tokenizer():
  return train_bpe(TEXTS, 300)


@pytest.fixture
def source(tmp_path):
  (tmp_path / 'texts').mkdir()
  for i, text in enumerate(TEXTS):
    (tmp_path / 'texts' / f'{i:02}.txt').write_text(text)
  return TextFiles(tmp_path / 'texts')


def stream(tokenizer):
  """What the windows join up to, the tail included."""
  bos = [] if tokenizer.bos is None else [tokenizer.bos]
  return [id for text in TEXTS for id in [*bos, *tokenizer.encode(text).tolist()]]


@pytest.mark.parametrize('bos', [0, None])
def test_windows_are_documents_each_after_bos_without_the_tail(bos, source, tokenizer, tmp_path):
  tokenizer = Tokenizer(tokenizer.backend, bos)
  found = pack(source, None, tokenizer, 64, tmp_path / 'cache')
  expected = stream(tokenizer)
  n = len(expected) // 64
  np.testing.assert_array_equal(found.array, np.reshape(expected[:n * 64], (n, 64)))
  assert found.array.dtype == np.uint16
  assert (len(found), found.length, found.tokens) == (n, 64, n * 64)
  assert found.stream_tokens == len(expected)
  assert found.bytes == sum(len(text.encode()) for text in TEXTS)
  assert found.documents == len(TEXTS)


@pytest.mark.parametrize('limit', [64, 100, 333])
def test_max_tokens_ends_the_stream_and_counts_only_its_bytes(limit, source, tokenizer, tmp_path):
  found = pack(source, 'all', tokenizer, 32, tmp_path, max_tokens=limit)
  expected = stream(tokenizer)[:limit]
  assert found.stream_tokens == limit
  np.testing.assert_array_equal(found.array.reshape(-1), expected[:limit // 32 * 32])
  assert found.documents == expected.count(tokenizer.bos)
  assert found.bytes == pytest.approx(len(tokenizer.decode(expected).encode()), abs=3)


def test_more_than_all_tokens_is_all_of_them(source, tokenizer, tmp_path):
  whole = pack(source, 'all', tokenizer, 32, tmp_path)
  found = pack(source, 'all', tokenizer, 32, tmp_path, max_tokens=10**9)
  np.testing.assert_array_equal(found.array, whole.array)
  assert (found.bytes, found.documents) == (whole.bytes, whole.documents)


def test_chunks_do_not_change_the_stream(source, tokenizer, tmp_path, monkeypatch):
  whole = pack(source, 'all', tokenizer, 32, tmp_path / 'a')
  monkeypatch.setattr(windows, 'CHUNK', 10)
  monkeypatch.setattr(windows, 'WHOLE', 100)
  found = pack(source, 'all', tokenizer, 32, tmp_path / 'b')
  np.testing.assert_array_equal(found.array, whole.array)
  assert (found.bytes, found.documents) == (whole.bytes, whole.documents)


@pytest.mark.parametrize('text', ['', 'a', 'a' * 25, 'line\n' * 9, '\n' * 30])
def test_pieces_of_a_long_document_join_to_it(text, monkeypatch):
  monkeypatch.setattr(windows, 'WHOLE', 10)
  pieces = [piece for chunk in windows.chunks([('name', text)], 5) for piece in chunk]
  assert ''.join(part for _, part in pieces) == text
  assert [first for first, _ in pieces] == [True] + [False] * (len(pieces) - 1)
  assert max(len(part) for _, part in pieces) <= 10


def test_the_same_content_is_found_again_and_any_change_is_packed_anew(
    source, tokenizer, tmp_path, monkeypatch):
  first = pack(source, 'all', tokenizer, 32, tmp_path / 'cache')
  kinds = [pack(source, 'train', tokenizer, 32, tmp_path / 'cache'),
           pack(source, 'all', tokenizer, 16, tmp_path / 'cache'),
           pack(source, 'all', tokenizer, 32, tmp_path / 'cache', max_tokens=64),
           pack(source, 'all', Tokenizer(tokenizer.backend), 32, tmp_path / 'cache')]
  assert len({first.fingerprint, *(kind.fingerprint for kind in kinds)}) == 5
  with monkeypatch.context() as patch:
    patch.setattr(windows, 'write', None)
    again = pack(source, 'all', tokenizer, 32, tmp_path / 'cache')
  np.testing.assert_array_equal(again.array, first.array)
  assert (again.fingerprint, again.bytes) == (first.fingerprint, first.bytes)
  (tmp_path / 'texts' / '00.txt').write_text('changed')
  assert pack(source, 'all', tokenizer, 32, tmp_path / 'cache').fingerprint != first.fingerprint


@pytest.mark.parametrize('damage', ['truncate', 'extend', 'remove', 'describe'])
def test_a_damaged_cache_is_made_again(damage, source, tokenizer, tmp_path):
  first = np.array(pack(source, 'all', tokenizer, 32, tmp_path / 'cache').array)
  path, = (tmp_path / 'cache').glob('*.tokens')
  if damage == 'remove':
    path.unlink()
  elif damage == 'describe':
    path.with_suffix('.json').write_text('{"stream')
  else:
    os.truncate(path, path.stat().st_size + (2 if damage == 'extend' else -2))
  np.testing.assert_array_equal(pack(source, 'all', tokenizer, 32, tmp_path / 'cache').array, first)


@pytest.mark.parametrize(('number', 'match'), [(errno.ENOSPC, 'no space left.*cache'),
                                               (errno.EACCES, 'cache.*name a place that can')])
def test_a_disk_that_cannot_be_written_is_named_and_left_clean(
    number, match, source, tokenizer, tmp_path, monkeypatch):
  def fail(_):
    raise OSError(number, os.strerror(number))
  with monkeypatch.context() as patch:
    patch.setattr(os, 'fsync', fail)
    with pytest.raises(InputError, match=match) as caught:
      pack(source, 'all', tokenizer, 32, tmp_path / 'cache')
  assert '\n' not in str(caught.value)
  assert list((tmp_path / 'cache').iterdir()) == []
  assert len(pack(source, 'all', tokenizer, 32, tmp_path / 'cache'))


def test_racing_processes_leave_one_whole_cache(source, tokenizer, tmp_path):
  tokenizer.save(tmp_path / 'tokenizer')
  code = ('import sys; from lean_jax.data import sources, tokenizer, windows; '
          'print(windows.pack(sources.TextFiles(sys.argv[1]), "all", '
          'tokenizer.load_tokenizer(sys.argv[2]), 32, sys.argv[3]).array.sum())')
  command = [sys.executable, '-c', code, source.path, tmp_path / 'tokenizer', tmp_path / 'cache']
  racers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
  sums = {racer.communicate()[0] for racer in racers}
  assert len(sums) == 1
  assert int(sums.pop()) == pack(source, 'all', tokenizer, 32, tmp_path / 'cache').array.sum()
  assert len(list((tmp_path / 'cache').iterdir())) == 2


def test_progress_ends_with_all_bytes(source, tokenizer, tmp_path):
  calls = []
  found = pack(source, 'train', tokenizer, 32, tmp_path, progress=lambda *call: calls.append(call))
  assert calls[-1] == (found.bytes, found.bytes, 'packing train')


def test_too_little_text_says_how_many_tokens_there_are(source, tokenizer, tmp_path):
  n = len(stream(tokenizer))
  with pytest.raises(InputError, match=f'{n} tokens, one window needs 99999'):
    pack(source, 'all', tokenizer, 99999, tmp_path / 'cache')
  assert list((tmp_path / 'cache').iterdir()) == []
  for length, most in ((0, None), (-1, None), (64, 63)):
    with pytest.raises(InputError, match='from 1 to max_tokens'):
      pack(source, 'all', tokenizer, length, tmp_path, max_tokens=most)
  with pytest.raises(InputError, match='no split'):
    pack(source, 'dev', tokenizer, 32, tmp_path)
