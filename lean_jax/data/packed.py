"""Text that somebody names, packed for a model for as long as it is needed."""
import contextlib
import tempfile

from lean_jax.data import sources
from lean_jax.data.windows import Windows, pack
from lean_jax.errors import InputError


def check_reads_text(model):
  """Raises InputError for a model that does not predict the next token of a text."""
  if not model.config.decoding.causal:
    raise InputError(f'a {model.family.model_type} sees all tokens at once and predicts no next '
                     'one; give training.recipe.train batches of tokens and labels')
  if 'decoder_tokens' in model.module.inputs:
    raise InputError(f'a {model.family.model_type} writes a target of a source, and text has no '
                     'targets; give training.recipe.train batches of tokens and decoder_tokens')


@contextlib.contextmanager
def packed_windows(data, split, model, window, field):
  """Windows of text, of those that `data` is of or packed from it for as long as the block lasts.
  """
  check_reads_text(model)
  if isinstance(data, Windows):
    yield data
    return
  if window > model.config.context:
    raise InputError(f'windows of {window} tokens are longer than the context of '
                     f'{model.config.context}; give at most that')
  with tempfile.TemporaryDirectory() as folder:
    yield pack(opened(data, field), split, model.tokenizer, window, folder)


def opened(data, field):
  """A Source of what a user gives."""
  return data if hasattr(data, 'documents') else sources.open_source(data, field=field)
