"""Perplexity; docs/evaluation.md has the protocol."""
import functools
import math
import time

import jax
import numpy as np

from lean_jax.data.batches import sequential
from lean_jax.errors import InputError
from lean_jax.models.cache import empty_cache
from lean_jax.training import mesh as meshes


def perplexity(module, params, windows, *, batch=16, progress=None):
  """How well a model predicts packed windows of text, see docs/evaluation.md.

  Args:
    module: a decoder.
    params: its parameters, of any kinds of weights.
    windows: `lean_jax.data.windows.Windows`, no longer than the context.
    batch: windows a step; changes memory and speed, not the result.
    progress: called with windows done, windows in all and what is done.

  Returns:
    dict: nll, nats a predicted token; perplexity, its exponential; bits_per_byte, of UTF-8 text;
    tokens, predicted; seconds, the compilation included.

  Raises:
    InputError: windows that the model cannot take.
  """
  check(module.config, windows)
  started = time.perf_counter()
  total, done, waiting = 0., 0, None
  for given in sequential(windows, min(batch, len(windows))):
    rows = int(given['mask'][:, 0].sum())
    with meshes.of(params):
      losses = nll(module, params, given['tokens'])
    if waiting is not None:
      total += summed(*waiting)             # of the batch before, while the device does this one
    waiting = losses, rows
    done += rows
    if progress:
      progress(done, len(windows), 'perplexity')
  total += summed(*waiting)
  count = len(windows) * (windows.length - 1)
  mean = total / count
  return dict(perplexity=math.exp(mean) if not mean > 700 else math.inf, nll=mean,
              bits_per_byte=mean / math.log(2) * windows.stream_tokens / windows.bytes,
              tokens=count, seconds=time.perf_counter() - started)


@functools.partial(jax.jit, static_argnames='module')
def nll(module, params, tokens):
  """-log p of each token but a row's first, given those before it: [B T-1] float32, nats.

  Only one row's logits are in memory at a time. A model whose config has a `cache` reads its keys
  and values from it, as it does while it writes.
  """
  config, cache = module.config, None
  if config.cache is not None:
    cache = empty_cache(config, *tokens.shape)
  x, _ = module.apply({'params': params}, tokens, cache, method='hidden')   # [B T D]

  def row(given):
    x, targets = given                                                      # [T-1 D], [T-1]
    logits = module.apply({'params': params}, x[None], method='logits')[0]
    wanted = jax.numpy.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - wanted

  return jax.lax.map(row, (x[:, :-1], tokens[:, 1:]))


def summed(losses, rows):
  """The sum over the first rows, in float64."""
  return float(np.asarray(losses)[:rows].sum(dtype=np.float64))


def check(config, windows):
  """Raises InputError if the model cannot predict these windows."""
  if not 2 <= windows.length <= config.context:
    raise InputError(f'windows of {windows.length} tokens; give 2 to {config.context}, the '
                     "model's context")
  largest = int(windows.array.max())
  if largest >= config.vocabulary:
    raise InputError(f'the text has token {largest}, the model has 0 to {config.vocabulary - 1}; '
                     'give the tokenizer of this model')
