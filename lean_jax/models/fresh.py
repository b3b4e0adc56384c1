"""Models that know nothing yet: of a family's config.json, or with a new head."""
import dataclasses

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.models.families import family_of
from lean_jax.models.segments import configured

HEADS = ('sequence', 'token')
HEAD = ('classifier', 'transform', 'head', 'head_bias')     # parameters that a head has


def described(hf, asked):
  """The family and the config of config.json.

  Args:
    hf: config.json; absent keys mean what they mean to transformers.
    asked: its keys that somebody wrote by hand: each is to say something to this family.

  Raises:
    InputError: no such family, a value that cannot be, or a key that changes nothing.
  """
  family = family_of(hf)
  config = family.from_hf(hf)
  known = family.to_hf(config)
  odd = [k for k in asked if k not in known and not _matters(family, hf, k, config)]
  if odd:
    raise InputError(f'a {family.model_type} has no {odd[0]!r}; its config.json has: '
                     f'{", ".join(known)}')
  return family, config


def _matters(family, hf, key, config):
  try:
    return family.from_hf({k: v for k, v in hf.items() if k != key}) != config
  except InputError:
    return True


def drawn(config, seed):
  """The params of `config.module` at random, as its modules draw them."""
  module = config.module
  tokens = {name: jnp.zeros((1, 2), jnp.int32) for name in module.inputs}
  return jax.jit(module.init)(jax.random.key(seed), **tokens)['params']


def with_head(family, config, params, labels, of, seed):
  """An encoder with a fresh head for labels, in place of the one that it had.

  What the family computes before the head is kept where it is the same, as BERT's pooler is.

  Args:
    labels: the classes' names.
    of: 'sequence', a class of each text, or 'token', of each token.
    seed: of the head's weights.

  Returns:
    config, params.

  Raises:
    InputError: no encoder, no labels, two of one name, or no such head.
  """
  labels = tuple(labels)
  if not hasattr(config, 'head'):
    raise InputError(f'a {family.model_type} is no encoder and has no head of classes; give one '
                     'that is: bert, distilbert, roberta, modernbert')
  if of not in HEADS:
    raise InputError(f'a head of {of!r}; expected one of {", ".join(HEADS)}')
  if not labels or len(set(labels)) < len(labels) or not all(isinstance(x, str) for x in labels):
    raise InputError(f'labels {labels!r}; expected names, each once')
  told = family.to_hf(dataclasses.replace(config, head=of, labels=labels, transform=None))
  new = family.from_hf(told)
  new = configured(new, dtype=config.dtype, remat=config.remat, scan_layers=config.scan_layers)
  same = new.transform == config.transform
  body = {k: w for k, w in params.items() if k not in HEAD or (k == 'transform' and same)}
  fresh = drawn(new, seed)
  return new, {k: body.get(k, w) for k, w in fresh.items()}
