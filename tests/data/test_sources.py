import json
import subprocess
import sys
import sysconfig

import pytest

from lean_jax.data import sources
from lean_jax.data.sources import JsonLines, StandardLibrary, TextFiles, open_source
from lean_jax.errors import InputError

SPLITS = ('train', 'validation', 'test')


def fails(match, call, *args, **kwargs):
  """Checks that a call fails for the user's input, in one line."""
  with pytest.raises(InputError, match=match) as caught:
    call(*args, **kwargs)
  assert '\n' not in str(caught.value)


def parts(source):
  """The documents of each split."""
  return [list(source.documents(split)) for split in SPLITS]


def share(source):
  """The share of bytes of each split."""
  sizes = [sum(len(text.encode()) for _, text in part) for part in parts(source)]
  return [size / sum(sizes) for size in sizes]


@pytest.fixture
def lines(tmp_path):
  path = tmp_path / 'corpus.jsonl'
  path.write_text(''.join(json.dumps(dict(text=f'story {i} ☂', id=i)) + '\n' for i in range(400)))
  return path


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'texts' / 'deep').mkdir(parents=True)
  for i in range(100):
    (tmp_path / 'texts' / ('deep' if i % 2 else '') / f'{i:03}.txt').write_text(f'file {i}\n' * 20)
  return tmp_path / 'texts'


@pytest.mark.parametrize('kind', ['code', 'docs', 'lines', 'folder'])
def test_splits_are_disjoint_repeatable_and_together_the_whole(kind, lines, folder):
  def source():
    return {'code': lambda: StandardLibrary(), 'docs': lambda: StandardLibrary('docs'),
            'lines': lambda: JsonLines(lines), 'folder': lambda: TextFiles(folder)}[kind]()
  found = parts(source())
  assert found == parts(source())
  names = [document.name for part in found for document in part]
  assert len(names) == len(set(names))
  assert sorted(document for part in found for document in part) == sorted(source().documents())
  assert source().fingerprint == source().fingerprint


def test_standard_library_is_large_enough_and_mostly_for_training():
  train, validation, test = share(StandardLibrary())
  assert sum(len(text) for _, text in StandardLibrary().documents()) > 5e6
  assert train > .8
  assert min(validation, test) > .01


def test_standard_library_has_no_tests_no_tables_and_no_copies():
  documents = list(StandardLibrary().documents())
  names = [name for name, _ in documents]
  assert 'argparse.py' in names
  assert names == sorted(names)
  assert not {'test', 'site-packages', 'pydoc_data'} & {name.split('/')[0] for name in names}
  assert 'encodings/cp850.py' not in names
  assert len({text for _, text in documents}) == len(documents)


def test_language_reference_shares_no_long_text_between_splits():
  train, validation, test = parts(StandardLibrary('docs'))
  paragraphs = [{part.strip() for _, text in split for part in text.split('\n\n')
                 if len(part) > 200} for split in (train, validation, test)]
  assert len(paragraphs[0]) > 100
  assert len(paragraphs[1] & paragraphs[0]) <= .05 * len(paragraphs[1])
  assert len(paragraphs[2] & paragraphs[0]) <= .05 * len(paragraphs[2])
  assert share(StandardLibrary('docs'))[0] > .6


def test_language_reference_is_read_and_never_run(tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: dict(stdlib=str(tmp_path)))
  path = tmp_path / 'pydoc_data' / 'topics.py'
  fails('topics.py', list, StandardLibrary('docs').documents())
  path.parent.mkdir()
  path.write_text("topics = {'a': exit()}")
  fails('not one dict', list, StandardLibrary('docs').documents())
  path.write_text("topics = {'a': 'one'\n 'two'}")
  assert list(StandardLibrary('docs').documents()) == [('pydoc_data/topics.py:a', 'onetwo')]
  fails('no Python modules', list, StandardLibrary().documents())


def test_standard_library_leaves_out_what_does_not_decode_and_follows_no_loop(
    tmp_path, monkeypatch):
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: dict(stdlib=str(tmp_path)))
  (tmp_path / 'latin.py').write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
  (tmp_path / 'bad.py').write_bytes(b"x = '\xe9'\n")
  (tmp_path / 'worse.py').write_bytes(b'# coding: no-such\n')
  (tmp_path / 'z_copy.py').symlink_to(tmp_path / 'latin.py')
  (tmp_path / 'dangling.py').symlink_to(tmp_path / 'absent.py')
  (tmp_path / 'loop').symlink_to(tmp_path)
  assert list(StandardLibrary().documents()) == [('latin.py', "# coding: latin-1\nx = 'é'\n")]


def test_small_corpus_is_cut_in_three_at_line_ends(tmp_path):
  text = ''.join(f'paragraph {i} ☂\nof two lines\n\n' for i in range(200))
  (tmp_path / 'a.txt').write_text(text)
  train, validation, test = parts(TextFiles(tmp_path / 'a.txt'))
  assert ''.join(part[0].text for part in (train, validation, test)) == text
  assert all(part[0].text.endswith('\n\n') for part in (train, validation, test))
  assert share(TextFiles(tmp_path / 'a.txt')) == pytest.approx([.9, .05, .05], abs=.01)
  assert list(TextFiles(tmp_path / 'a.txt').documents()) == [('a.txt', text)]


@pytest.mark.parametrize('text', [
    '☂' * 100, 'word ' * 30, 'line\n' * 40, 'abcdefghijklmnopqrst', 'a\n\n' + 'b' * 99])
def test_a_text_without_paragraphs_is_cut_too(text, tmp_path):
  (tmp_path / 'a.txt').write_text(text)
  found = [document.text for part in parts(TextFiles(tmp_path / 'a.txt')) for document in part]
  assert len(found) == 3
  assert ''.join(found) == text


def test_twenty_files_are_split_by_file_and_binary_ones_left_out(folder):
  (folder / 'image.png').write_bytes(bytes(range(256)))
  (folder / 'nul.txt').write_bytes(b'a\0b')
  (folder / '.hidden').write_text('no')
  source = TextFiles(folder)
  assert [name for name, _ in source.documents()] == sorted(
      [f'{i:03}.txt' for i in range(0, 100, 2)] + [f'deep/{i:03}.txt' for i in range(1, 100, 2)])
  train, validation, test = map(len, parts(source))
  assert train + validation + test == 100
  assert train > 80
  assert min(validation, test) > 0


def test_fingerprint_changes_with_a_name_or_a_byte_and_not_with_the_place(folder, tmp_path):
  before = TextFiles(folder).fingerprint
  folder.rename(tmp_path / 'moved')
  assert TextFiles(tmp_path / 'moved').fingerprint == before
  (tmp_path / 'moved' / '000.txt').rename(tmp_path / 'moved' / 'new.txt')
  renamed = TextFiles(tmp_path / 'moved').fingerprint
  (tmp_path / 'moved' / 'new.txt').write_text('other')
  assert len({before, renamed, TextFiles(tmp_path / 'moved').fingerprint}) == 3


def test_json_lines_keep_every_text_in_order(lines):
  assert [text for _, text in JsonLines(lines).documents()] == [
      f'story {i} ☂' for i in range(400)]
  assert share(JsonLines(lines)) == pytest.approx([.9, .05, .05], abs=.04)


def test_json_list_and_folder_of_json_lines_are_read(lines, tmp_path):
  (tmp_path / 'list.json').write_text(json.dumps([dict(text='a'), dict(text='b')]))
  assert [text for _, text in open_source(tmp_path / 'list.json').documents()] == ['a', 'b']
  (tmp_path / 'a.jsonl').write_text('\ufeff{"text": "first"}\r\n\r\n')
  documents = list(open_source(tmp_path).documents())
  assert len(documents) == 401
  assert documents[0] == ('a.jsonl:1', 'first')


@pytest.mark.parametrize(('line', 'match'), [
    ('{"text": ', 'jsonl:2: not JSON'), ('[1]', 'jsonl:2: a list'),
    ('{"body": "x", "id": 1}', "jsonl:2: no field 'text'.*'body', 'id'"),
    ('{"text": 3}', 'jsonl:2.*int'), (r'{"text": "\ud800"}', 'jsonl:2.*surrogate'),
    ('[' * 100000, 'jsonl:2: not JSON')])
def test_a_bad_line_is_named(line, match, tmp_path):
  path = tmp_path / 'bad.jsonl'
  path.write_text('{"text": "good"}\n' + line + '\n')
  fails(match, list, JsonLines(path).documents())


def test_open_source_picks_by_path(lines, folder, tmp_path):
  (tmp_path / 'a.txt').write_text('text')
  assert open_source() == open_source('stdlib') == StandardLibrary()
  assert open_source('stdlib:docs') == StandardLibrary('docs')
  assert open_source(lines) == JsonLines(str(lines))
  assert open_source(folder) == TextFiles(str(folder))
  assert open_source(tmp_path / 'a.txt') == TextFiles(str(tmp_path / 'a.txt'))
  assert open_source(lines, kind='text') == TextFiles(str(lines))


def test_errors_are_one_line_and_say_what_there_is(tmp_path, lines):
  (tmp_path / 'empty.txt').write_text(' \n')
  (tmp_path / 'binary').write_bytes(b'\xff\xfe')
  (tmp_path / 'none').mkdir()
  (tmp_path / 'object.json').write_text('{}')
  fails('no file or folder', open_source, tmp_path / 'absent')
  fails('no file or folder', open_source, '', kind='text')
  fails('no text', open_source, tmp_path / 'empty.txt')
  fails('no text', open_source, tmp_path / 'none')
  fails('not UTF-8 text from byte 0', open_source, tmp_path / 'binary')
  fails('no .jsonl files', open_source, tmp_path / 'none', kind='jsonl')
  fails('not a list', open_source, tmp_path / 'object.json')
  fails("'story'.*'text', 'id'", open_source, lines, field='story')
  fails('code.*docs', open_source, 'stdlib:tests')
  fails('auto, stdlib', open_source, 'stdlib', kind='csv')
  fails('train, validation, test', StandardLibrary().documents, 'dev')


def test_importing_the_package_imports_nothing_heavy():
  heavy = ('jax', 'grain', 'tensorflow_datasets', 'tensorflow')
  code = ('import sys; import lean_jax.data.sources, lean_jax.data.tokenizer, '
          'lean_jax.data.windows, lean_jax.data.batches; '
          f'assert not set({heavy}) & set(sys.modules), sys.modules.keys()')
  subprocess.run([sys.executable, '-c', code], check=True)
  assert sources.SPLITS == SPLITS
