"""Adapters beside the weights: bottlenecks, prefixes and soft prompts, put into a tree."""
import inspect
import math

import jax
import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.models.prefix import check_takes_prefix, has_prefix, put
from lean_jax.models.segments import extended, replaced
from lean_jax.nn.mlp import ACTIVATIONS
from lean_jax.weights.beside import Bottleneck, DeepPrefix, Prefix, Prompt

HOULSBY, PFEIFFER = ('mixer', 'feed_forward'), ('feed_forward',)


def attached(config, params, method, settings, key):
  """The params with an adapter of a method of `METHODS`.

  Raises:
    InputError: a setting that it does not have or that is out of range, a model that cannot have
      it, or one that has such a thing already.
  """
  make = METHODS[method]
  takes = [k for k in inspect.signature(make).parameters if k not in ('config', 'params', 'key')]
  odd = sorted(set(settings) - set(takes))
  if odd:
    raise InputError(f'{method!r} has no setting {odd[0]!r}; it has: {", ".join(takes)}')
  return make(config, params, key=key, **settings)


def houlsby(config, params, *, key, rank=64, activation='gelu', scale=1.):
  """Bottlenecks after attention (or another mixer) and after the feed-forward block of each layer.

  Houlsby et al. 2019 (arXiv:1902.00751). The base's norms stay as they are.
  """
  return _bottlenecks(config, params, HOULSBY, key, rank, activation, False, scale)


def pfeiffer(config, params, *, key, rank=64, activation='relu', scale=1.):
  """Bottlenecks after the feed-forward blocks alone (Pfeiffer et al. 2020, arXiv:2005.00247).

  Each is given what the block gives, before what a layer adds and normalises.
  """
  return _bottlenecks(config, params, PFEIFFER, key, rank, activation, False, scale)


def parallel(config, params, *, key, rank=64, activation='relu', scale=4.):
  """Bottlenecks beside the feed-forward blocks, of the blocks' inputs (He et al. 2021,
  arXiv:2110.04366, section 3.3; table 6 has 4 as the scale).
  """
  return _bottlenecks(config, params, PFEIFFER, key, rank, activation, True, scale)


def _bottlenecks(config, params, branches, key, rank, activation, beside, scale):
  """The params with a Bottleneck at each of the branches that a layer has; each begins as nothing,
  `up` being zero.
  """
  if activation not in ACTIVATIONS:
    raise InputError(f'no activation {activation!r}; there are: {", ".join(ACTIVATIONS)}')
  made = 0
  for prefix, stack in config.stacks.items():
    if not 1 <= rank <= stack.width:
      raise InputError(f'bottlenecks of {rank}; give 1 to {stack.width}, the width of the model')

    def make(kind, layers, stack=stack):
      nonlocal made
      has = dict(mixer=kind[0], feed_forward=kind[1])
      out = {}
      for branch in branches:
        if has[branch] is None:
          continue
        made += 1
        D, lead = stack.width, () if layers is None else (layers,)
        down = jax.random.normal(jax.random.fold_in(key, made), (*lead, D, rank)) / math.sqrt(D)
        zeros = lambda *shape, lead=lead: jnp.zeros((*lead, *shape))
        out[f'{branch}_adapter'] = Bottleneck(
            down, zeros(rank), zeros(rank, D), zeros(D), activation, beside, float(scale),
            'n' * len(lead), ('layers',) * len(lead))
      return out

    def change(layers, stack=stack, make=make):
      return extended(stack, layers, make)
    params = replaced(params, f'{prefix}layers'.split('/'), change)
  if not made:
    raise InputError(f'no layer has a {" or ".join(branches)} to put a bottleneck at; use houlsby')
  return params


def prefix(config, params, *, key, tokens=16, hidden=512):
  """Keys and values before every text, made by an MLP of `hidden` while they train.

  Li and Liang 2021 (arXiv:2101.00190), section 4.3.
  """
  _check(config, params, tokens, Prefix)
  N, G, K, D = _sizes(config)
  if hidden < 1:
    raise InputError(f'an MLP of {hidden}; give 1 or more, or use p_tuning_v2, which has none')
  draw = lambda k, *shape: jax.random.normal(jax.random.fold_in(key, k), shape)
  return put(config, params, 'prefix', DeepPrefix(
      draw(0, tokens, D), draw(1, D, hidden) / math.sqrt(D), jnp.zeros(hidden),
      draw(2, hidden, N * 2 * G * K) / math.sqrt(hidden), jnp.zeros(N * 2 * G * K), (N, G, K)))


def p_tuning_v2(config, params, *, key, tokens=16):
  """Keys and values before every text, themselves trained (Liu et al. 2021, arXiv:2110.07602)."""
  _check(config, params, tokens, Prefix)
  N, G, K, _ = _sizes(config)
  k, v = (jax.random.normal(part, (N, tokens, G, K)) for part in jax.random.split(key))
  return put(config, params, 'prefix', Prefix(k, v))


def prompt(config, params, *, key, tokens=16):
  """Embeddings before every text, of an encoder and a decoder before every source, which begin as
  those of tokens drawn from the vocabulary.

  Lester et al. 2021 (arXiv:2104.08691), section 3.2.
  """
  _check(config, params, tokens, Prompt)
  reader = config.stacks.get('encoder/', config)
  if reader.embedding_width not in (None, reader.width):
    raise InputError('a soft prompt for embeddings narrower than the model; use a prefix')
  ids = jax.random.randint(key, (tokens,), 0, config.vocabulary)
  rows = params['embed']['table'].take(ids).astype(jnp.float32)
  return put(config, params, 'prompt', Prompt(rows * reader.embedding_scale))


def _check(config, params, tokens, kind):
  check_takes_prefix(config, kind)
  if has_prefix(config, params):
    raise InputError('the model has a prefix or a prompt already; load it anew, without')
  if not 1 <= tokens < config.context:
    raise InputError(f'{tokens} tokens before every text; give 1 to {config.context - 1}, within '
                     'the context')


def _sizes(config):
  """N, G, K and D of the stack that a prefix stands in."""
  c = config.decoding
  return c.layers, c.groups, c.head_width, c.width


METHODS = dict(houlsby=houlsby, pfeiffer=pfeiffer, parallel=parallel, prefix=prefix,
               p_tuning_v2=p_tuning_v2, prompt=prompt)
