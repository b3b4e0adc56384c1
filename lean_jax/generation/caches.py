"""How keys and values of a text are kept while it is written."""
import difflib

import jax

from lean_jax.errors import InputError
from lean_jax.models.cache import empty_cache
from lean_jax.models.segments import configured
from lean_jax.nn.rounded import Rounding

CACHES = dict(float=None, int8=Rounding(8), int4=Rounding(4))


def with_cache(module, cache, ahead=0):
  """The module that keeps keys and values as `cache` says.

  Args:
    module: a decoder; with 'float', any.
    cache: a name of `CACHES`; None is 'float'.
    ahead: drafted tokens that may be taken back at a time.

  Raises:
    InputError: no such cache, or a model or a draft that it is not for.
  """
  if cache is not None and cache not in CACHES:
    near = difflib.get_close_matches(str(cache), CACHES, n=1)
    hint = f'; near it: {near[0]}' if near else ''
    raise InputError(f'no cache {cache!r}; there are: {", ".join(CACHES)}{hint}')
  rounding = None if cache is None else CACHES[cache]
  if rounding is None:
    return module
  if 'decoder_tokens' in module.inputs:
    raise InputError(f'cache {cache!r} of an encoder and a decoder, which attends to its source; '
                     "it is for decoders, use cache='float'")
  mixers = {layer.mixer for layer in module.config.each}
  if 'latent' in mixers:
    raise InputError(f'cache {cache!r} of latent attention, which keeps one short vector a token '
                     "and no keys and values; use cache='float'")
  if 'attention' not in mixers:
    raise InputError(f'cache {cache!r} of a model without keys and values ({", ".join(mixers)}), '
                     "whose state does not grow; use cache='float'")
  if ahead > rounding.group:
    raise InputError(f'{ahead} tokens ahead; of cache {cache!r} {rounding.group} can be taken back '
                     "at most, give fewer, or cache='float'")
  if ahead:
    rounding = Rounding(rounding.bits, rounding.group, kept=2)
  return configured(module.config, cache=rounding).module


def cache_bytes(config, rows, length, source=0):
  """Bytes of the cache of `rows` texts of `length` tokens, of `source` tokens of an encoder."""
  like = jax.eval_shape(lambda: empty_cache(config, rows, length, source))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
