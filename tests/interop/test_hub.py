"""Ids of the hub, in fresh processes: a cache made here, and hubs on this machine alone."""
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from lean_jax.errors import InputError
from lean_jax.interop.hub import local_folder

ROOT = pathlib.Path(__file__).parents[2]
SHA = 'a' * 40
PROGRAM = """
import sys
from lean_jax.errors import InputError
from lean_jax.interop.hub import local_folder
try:
  print(local_folder(sys.argv[1]))
except InputError as error:
  print('InputError', error)
"""


def found(where, cache, **env):
  """What `local_folder` says in a process of these environment variables."""
  known = {name: value for name, value in os.environ.items() if name != 'HF_HUB_OFFLINE'}
  env = dict(known, HF_HUB_CACHE=str(cache), HF_HUB_DISABLE_TELEMETRY='1', NO_PROXY='*',
             PYTHONPATH=str(ROOT), HF_HUB_DISABLE_PROGRESS_BARS='1') | env
  out = subprocess.run([sys.executable, '-c', PROGRAM, where], env=env, capture_output=True,
                       text=True, timeout=60, check=True, cwd=cache)
  return out.stdout.removesuffix('\n')


def cached(cache, name, revision='main', sha=SHA):
  """A snapshot in the layout of the hub's cache."""
  folder = cache / f'models--{name.replace("/", "--")}'
  (folder / 'refs').mkdir(parents=True)
  (folder / 'refs' / revision).write_text(sha)
  snapshot = folder / 'snapshots' / sha
  snapshot.mkdir(parents=True)
  (snapshot / 'config.json').write_text('{}')
  return snapshot


def free_port():
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return one.getsockname()[1]


def test_a_folder_is_itself_whatever_its_name(tmp_path, monkeypatch):
  (tmp_path / 'org' / 'name').mkdir(parents=True)
  monkeypatch.chdir(tmp_path)
  for where in ('org/name', tmp_path, str(tmp_path)):
    assert local_folder(where) == pathlib.Path(where)
  code = "import sys, lean_jax.interop.hub; sys.exit('huggingface_hub' in sys.modules)"
  subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)


@pytest.mark.parametrize('where', ['none', './org/name', '/org/name', '../name', 'a/b/c', 'org/',
                                   'org/name@', 'file/here', pathlib.Path('org/name')])
def test_what_is_neither_a_folder_nor_an_id_is_refused(where, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').mkdir()
  (tmp_path / 'file' / 'here').touch()
  with pytest.raises(InputError, match='^no folder .*; give one with config.json'):
    local_folder(where)


def test_the_cache_is_enough_without_a_network(tmp_path):
  main, old = cached(tmp_path, 'org/tiny'), cached(tmp_path, 'org/old', 'v1.0', 'b' * 40)
  offline = lambda where: found(where, tmp_path, HF_HUB_OFFLINE='1')
  assert offline('org/tiny') == offline(f'org/tiny@{SHA}') == str(main)
  assert offline('org/old@v1.0') == str(old)
  for where in ('org/other', 'org/tiny@v2', 'org/old'):
    says = offline(where)
    assert says.startswith('InputError no folder') and '\n' not in says
    assert where in says and 'HF_HUB_OFFLINE' in says and 'give a folder' in says


def test_a_hub_that_cannot_be_reached_is_told_at_once(tmp_path):
  nobody, start = f'http://127.0.0.1:{free_port()}', time.monotonic()
  says = found('org/other', tmp_path, HF_ENDPOINT=nobody)
  assert time.monotonic() - start < 15
  assert 'hub cannot be reached' in says and 'refused' in says and '\n' not in says
  kept = cached(tmp_path, 'org/tiny')
  assert found('org/tiny', tmp_path, HF_ENDPOINT=nobody) == str(kept)


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of a hub as a download needs; the server has `files`, {name: bytes}."""
  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    files, path = self.server.files, self.path.split('?')[0]
    if path.startswith('/api/models/org/gated'):
      self.answer(403, headers={'X-Error-Code': 'GatedRepo'})
    elif path == '/api/models/org/tiny/revision/main':
      self.answer(200, json.dumps(dict(id='org/tiny', sha=SHA, siblings=[
          dict(rfilename=name) for name in files])).encode())
    elif path.startswith('/api/models/org/tiny/revision'):
      self.answer(404, headers={'X-Error-Code': 'RevisionNotFound'})
    elif path == f'/api/models/org/tiny/tree/{SHA}':
      self.answer(200, json.dumps([
          dict(type='file', path=name, size=len(value), oid=str(k) * 40)
          for k, (name, value) in enumerate(files.items())]).encode())
    elif path.startswith(f'/org/tiny/resolve/{SHA}/'):
      name = path.removeprefix(f'/org/tiny/resolve/{SHA}/')
      self.server.asked.add(name)
      self.answer(200, files[name], {'X-Repo-Commit': SHA, 'ETag': f'"{abs(hash(name))}"'})
    else:
      self.answer(404, headers={'X-Error-Code': 'RepoNotFound'})

  do_HEAD = do_GET

  def answer(self, code, body=b'', headers=()):
    self.send_response(code)
    self.send_header('Content-Length', str(len(body)))
    for pair in dict(headers).items():
      self.send_header(*pair)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture
def hub():
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  server.asked = set()
  server.files = {name: name.encode() for name in (
      'config.json', 'model.safetensors', 'tokenizer.json', 'chat_template.jinja', 'vocab.txt',
      'spiece.model', '1_Pooling/config.json', 'pytorch_model.bin', 'consolidated.safetensors',
      'original/model.safetensors', 'onnx/config.json', 'README.md', 'run.py')}
  thread = threading.Thread(target=server.serve_forever, args=(.02,), daemon=True)
  thread.start()
  yield server
  server.shutdown()
  server.server_close()
  thread.join()


def test_what_a_model_is_made_of_is_fetched_and_nothing_else(tmp_path, hub):
  endpoint = dict(HF_ENDPOINT=f'http://127.0.0.1:{hub.server_address[1]}')
  folder = pathlib.Path(found('org/tiny', tmp_path, **endpoint))
  names = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
  assert names == hub.asked == {
      'config.json', 'model.safetensors', 'tokenizer.json', 'chat_template.jinja', 'vocab.txt',
      'spiece.model', '1_Pooling/config.json'}
  assert all((folder / name).read_bytes() == name.encode() for name in names)
  assert found('org/tiny', tmp_path, HF_HUB_OFFLINE='1') == str(folder)


@pytest.mark.parametrize(('where', 'words'), [
    ('org/nothing', 'no such model'), ('org/tiny@v9', 'no such model or revision'),
    ('org/gated', 'ask for it'), ('a--b/c', 'no such model')])
def test_what_the_hub_refuses_is_said_in_a_line(tmp_path, hub, where, words):
  says = found(where, tmp_path, HF_ENDPOINT=f'http://127.0.0.1:{hub.server_address[1]}')
  assert says.startswith('InputError') and where in says and words in says and '\n' not in says
