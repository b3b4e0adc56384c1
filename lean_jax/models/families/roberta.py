"""RoBERTa (Liu et al. 2019, arXiv:1907.11692)."""
import dataclasses

from lean_jax.errors import InputError
from lean_jax.models.families import bert
from lean_jax.models.families.base import (
  Family,
  Stored,
  layer_norm,
  linear,
  positive,
  token,
  with_bias,
)
from lean_jax.models.families.heads import head

DEFAULTS = bert.DEFAULTS | dict(vocab_size=50265, pad_token_id=1)


def from_hf(hf):
  """The config of config.json; absent keys mean what they mean to transformers."""
  heads = head(hf, 'Roberta')
  hf = DEFAULTS | hf
  # A token's position is its number, from 1, and the id of padding.
  rows, offset = positive(hf, 'max_position_embeddings'), token(hf, 'pad_token_id', -1) + 1
  if not 0 < offset < rows:
    raise InputError(f'config.json has pad_token_id = {hf["pad_token_id"]!r}, expected an id less '
                     f'than max_position_embeddings - 1, {rows - 1}')
  c = bert.shared(hf, rows - offset, offset, **heads)
  return dataclasses.replace(c, transform=bert.transform(c, 'gelu', bert.pooler(hf)))


def to_hf(c):
  """config.json of a config."""
  return bert.shared_hf(c, 'roberta', 'Roberta') | dict(pad_token_id=c.position_offset - 1)


def names(c):
  """Where a checkpoint has each array."""
  last = {
      'masked': lambda: with_bias('transform/dense', 'lm_head.dense')
      | layer_norm('transform/norm', 'lm_head.layer_norm')
      | {'head_bias': Stored('lm_head.bias'), 'head/kernel': linear('lm_head.decoder.weight')},
      'sequence': lambda: with_bias('transform/dense', 'classifier.dense')
      | with_bias('classifier', 'classifier.out_proj'),
      'token': lambda: with_bias('classifier', 'classifier'),
      None: lambda: with_bias('transform/dense', 'roberta.pooler.dense')}
  return bert.body('roberta') | last[c.head]()


ROBERTA = Family('roberta', from_hf, to_hf, names, prefix='roberta.',
                 ignored=bert.ignored('roberta'), older=bert.OLDER, settle=bert.settle,
                 copies={'lm_head.decoder.bias': 'lm_head.bias'})
