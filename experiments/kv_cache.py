r"""Keys and values in 8 and 4 bits cost a text's model next to nothing.

Liu et al. 2024 (KIVI, arXiv:2402.02750): a cache in four bits keeps the model's quality (section
4), where keys share their grids along tokens, channel by channel, since some channels are far from
the others in all tokens (section 3).

python -m lean_jax.experiments.kv_cache DIR --data stories.jsonl [--window N] [--tokens N]

Perplexity by docs/evaluation.md, each key and value read as decoding reads it: from codes, but for
the tokens of a group of 32 that is not full. Ends with exit code 1 where a claim fails.

Measured on the first 131,072 tokens of TinyStories, in windows of the context of 512: stories260K
8 bits +0.004%, 4 bits +0.24%, keys off by .029 of their size per channel and .054 per token; a
Llama of 850 thousand parameters +0.008%, +0.56%, .058 and .081. About a minute each on two CPU
cores.
"""
import sys

import jax
import jax.numpy as jnp

from lean_jax.evaluation.perplexity import perplexity
from lean_jax.generation.caches import CACHES, cache_bytes, with_cache
from lean_jax.models.cache import empty_cache
from lean_jax.nn.rounded import decoded, encoded
from lean_jax.pipeline import on_text

INT8, INT4 = 1.001, 1.01      # times the perplexity of floats, at most


def measured(model, windows):
  """Of each cache its perplexity and its bytes for a window; of keys the error of each grid."""
  out = {}
  for cache in CACHES:
    module = with_cache(model.module, cache)
    found = perplexity(module, model.params, windows)
    out[cache] = dict(perplexity=found['perplexity'],
                      bytes=cache_bytes(module.config, 1, windows.length))
  tokens = jnp.asarray(windows.array[:1, :windows.length // 32 * 32], jnp.int32)
  cache = empty_cache(model.config, *tokens.shape)
  _, cache = model.module.apply({'params': model.params}, tokens, cache)
  for per_token in (False, True):
    out['keys per token' if per_token else 'keys per channel'] = dict(
        error=error(cache['layers'], per_token))
  return out


def error(tree, per_token):
  """|x - rounded x| / |x| of all cached keys in four bits."""
  rounding, off, whole = CACHES['int4'], 0., 0.
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if path[-1].key == 'k':
      x = x.reshape(-1, *x.shape[-2:]).astype(jnp.float32)
      codes = encoded(x, jnp.ones((*x.shape[:2], 1), bool), rounding, per_token=per_token)
      off += jnp.sum((decoded(*codes, rounding, x.dtype) - x) ** 2)
      whole += jnp.sum(x ** 2)
  return float(jnp.sqrt(off / whole))


def claims(found):
  """[(claim, whether it holds)]."""
  of = lambda name: found[name]['perplexity'] / found['float']['perplexity']
  return [
      (f'int8 is within {INT8 - 1:.1%} of float: {of("int8") - 1:+.4%}', of('int8') < INT8),
      (f'int4 is within {INT4 - 1:.1%} of float: {of("int4") - 1:+.4%}', of('int4') < INT4),
      ('keys per channel are nearer than keys per token: '
       f'{found["keys per channel"]["error"]:.4f} against {found["keys per token"]["error"]:.4f}',
       found['keys per channel']['error'] < found['keys per token']['error']),
  ]


def main(argv=None):
  """Prints figures and claims, and returns the exit code."""
  return on_text.main(__doc__, measured, claims, argv)


if __name__ == '__main__':
  sys.exit(main())
