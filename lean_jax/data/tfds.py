"""TensorFlow Datasets, read without TensorFlow."""

import dataclasses

from lean_jax.data.documents import SPLITS, Document, Source, split_of
from lean_jax.errors import InputError

# Rows read at a time: four times as fast as one by one.
READ = 1000


@dataclasses.dataclass(frozen=True)
class Tfds(Source):
  """A dataset that TFDS has prepared as array_record, the only format it reads whole without
  TensorFlow: tfrecord needs it, and parquet loses rows silently.

  Where the dataset has no 'validation' or 'test' of its own, 5 % each of its 'train' become it,
  by the hash of the index.

  Attributes:
    name: as TFDS spells it, for example 'imdb_reviews/plain_text:1.0.0'.
    data_dir: where it was prepared; None is TFDS's own default.
    field: the feature with the text.
  """
  name: str
  data_dir: str | None = None
  field: str = 'text'

  def _documents(self, split):
    builder = self._builder()
    own = [part for part in SPLITS if part in builder.info.splits]
    read = own if split is None else [split if split in own else 'train']
    for part in read:
      rows = self._rows(builder, part)
      wanted = range(len(rows))
      if split and part == 'train':  # only the splits that the dataset lacks are carved
        lacking = {name for name in SPLITS if name not in own}
        wanted = [index for index in wanted
                  if split == (owner if (owner := split_of(str(index))) in lacking else 'train')]
      for first in range(0, len(wanted), READ):
        indices = wanted[first:first + READ]
        for index, text in zip(indices, self._texts(rows, part, indices), strict=True):
          yield Document(f'{part}:{index}', text)

  def _builder(self):
    try:
      import tensorflow_datasets
    except ImportError as error:
      raise InputError(f'reading {self.name!r} needs the packages tensorflow-datasets and '
                       'array-record; pip install them') from error
    try:
      builder = tensorflow_datasets.builder(
          self.name, data_dir=self.data_dir, file_format='array_record', try_gcs=False)
      prepared, features = sorted(builder.info.splits), builder.info.features
    except Exception as error:  # TFDS raises many kinds, on many lines
      raise InputError(
          f'TFDS cannot open {self.name!r} in {self.data_dir or "its default folder"}: '
          f"{line(error)}; prepare it with file_format='array_record', and give its data_dir"
          ) from error
    if not prepared or builder.info.file_format.value != 'array_record':
      raise InputError(
          f'{self.name!r} is not prepared as array_record in {builder.data_path.parent}; run '
          f"tfds.builder({self.name!r}, data_dir=..., file_format='array_record')"
          '.download_and_prepare()')
    if 'train' not in prepared:
      raise InputError(f"{self.name!r} has no split 'train'; there are: {', '.join(prepared)}")
    if self.field not in features:
      raise InputError(f'{self.name!r} has no field {self.field!r}; there are: '
                       f"{', '.join(sorted(features))}")
    return builder

  def _rows(self, builder, part):
    try:
      rows = builder.as_data_source(split=part)
      count = len(rows)
    except Exception as error:
      raise InputError(f'cannot read {part!r} of {self.name!r}: {line(error)}; prepare the dataset '
                       'again') from error
    wanted = builder.info.splits[part].num_examples
    if count != wanted:
      raise InputError(f'{part!r} of {self.name!r} has {count} rows on disk and {wanted} in its '
                       'description; prepare the dataset again')
    return rows

  def _texts(self, rows, part, indices):
    try:
      values = [row[self.field] for row in rows.__getitems__(list(indices))]
      return [value.decode() for value in values]
    except Exception as error:
      raise InputError(f'cannot read field {self.field!r} of {part!r} of {self.name!r} as text: '
                       f'{line(error)}; choose a text field, or prepare the dataset again'
                       ) from error


def line(error):
  """The first line of an error."""
  return next(iter(str(error).splitlines()), type(error).__name__)
