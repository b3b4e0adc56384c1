"""A real TFDS dataset, prepared from local text without TensorFlow and without a network."""

import pathlib
import sys
import warnings

import pytest

from lean_jax.data.sources import Tfds, open_source
from lean_jax.errors import InputError

TEXTS = {'train': [f'story {i} ☂\nline two' for i in range(300)],
         'test': [f'kept {i}' for i in range(20)]}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The folder where the dataset lean_stories is prepared."""
  folder = tmp_path_factory.mktemp('tfds')
  for part, texts in TEXTS.items():
    (folder / f'{part}.txt').write_text('\0'.join(texts))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of protobuf, in its own import
    import tensorflow_datasets as tfds

  class LeanStories(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    code_path = pathlib.Path(__file__)  # found by itself only with importlib_resources

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
          dict(text=tfds.features.Text(), label=tfds.features.ClassLabel(num_classes=2))))

    def _split_generators(self, _):
      return {part: self._generate_examples(folder / f'{part}.txt') for part in TEXTS}

    def _generate_examples(self, path):
      for i, text in enumerate(path.read_text().split('\0')):
        yield i, dict(text=text, label=i % 2)

  LeanStories(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def test_a_real_dataset_is_read_back_whole_without_tensorflow(prepared):
  documents = list(Tfds('lean_stories', prepared).documents())
  assert sorted(text for _, text in documents) == sorted(TEXTS['train'] + TEXTS['test'])
  assert 'tensorflow' not in sys.modules


def test_its_own_splits_are_kept_and_what_it_lacks_is_carved_from_train(prepared):
  source = open_source('tfds:lean_stories', data_dir=prepared)
  train, validation, test = ([text for _, text in source.documents(split)]
                             for split in ('train', 'validation', 'test'))
  assert sorted(test) == sorted(TEXTS['test'])
  assert sorted(train + validation) == sorted(TEXTS['train'])
  assert 0 < len(validation) < 50
  assert train == [text for _, text in source.documents('train')]
  assert source.fingerprint == Tfds('lean_stories:1.0.0', prepared).fingerprint


def fails(match, source):
  with pytest.raises(InputError, match=match) as caught:
    list(source.documents())
  assert '\n' not in str(caught.value)


def test_errors_say_how_to_prepare_and_what_there_is(prepared, tmp_path):
  fails("no field 'story'.*label, text", Tfds('lean_stories', prepared, field='story'))
  fails('as text.*choose a text field', Tfds('lean_stories', prepared, field='label'))
  fails("array_record.*download_and_prepare", Tfds('imdb_reviews', tmp_path))
  fails('cannot open', Tfds('no_such_dataset', tmp_path))
  fails('cannot open', Tfds('not a name', tmp_path))


def test_lost_rows_are_an_error(prepared, monkeypatch):
  from tensorflow_datasets.core import splits
  source = Tfds('lean_stories', prepared)
  monkeypatch.setattr(splits.SplitInfo, 'num_examples', 301)
  fails('300 rows on disk and 301', source)
