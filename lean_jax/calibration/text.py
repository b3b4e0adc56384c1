"""Text as the batches that a model is calibrated on."""
import numpy as np

from lean_jax.data.padded import padded
from lean_jax.errors import InputError
from lean_jax.evaluation.texts import limit, read, reads


def text_batches(module, tokenizer, data, windows, *, samples, batch):
  """Dicts of arrays, what `objectives.forward` takes.

  A decoder reads windows of packed text, spread evenly over it. Another model reads documents, one
  a row, cut where they are too long; with an encoder and a decoder each is its own target.

  Args:
    module: of the model.
    data: a Source; not read if windows are given.
    windows: Windows for a decoder, or None.
    samples: how many windows or documents; all there are if they are fewer.
    batch: of them at a time; what is left of the last batch is not used.

  Raises:
    InputError: no sample or batch is asked for, or the text has none.
  """
  if samples < 1 or batch < 1:
    raise InputError(f'{samples} samples, {batch} at a time; give 1 or more of both')
  if windows is not None:
    return of_windows(windows, samples, batch)
  texts = [text for (_, text), _ in zip(data.documents('all'), range(samples))]
  rows = read(module, tokenizer, texts, limit(module.config, tokenizer), True)
  out = []
  for _, given in padded(rows, batch, reads(module.config).context):
    if 'decoder_tokens' in module.inputs:
      tokens, mask = given['tokens'], given['mask']
      start = np.full_like(tokens[:, :1], module.config.start)
      given = dict(tokens=tokens, mask=mask, decoder_mask=mask,
                   decoder_tokens=np.concatenate([start, tokens[:, :-1]], axis=1))
    elif not getattr(module.config, 'token_types', 0):
      given = {k: given[k] for k in ('tokens', 'mask')}
    out.append(given)
  return out


def of_windows(windows, samples, batch):
  """Batches of windows spread evenly over all of them."""
  count = min(samples, len(windows))
  batch = min(batch, count)
  at = np.linspace(0, len(windows) - 1, count // batch * batch).round().astype(int)
  tokens = np.asarray(windows.array[at], np.int32).reshape(-1, batch, windows.length)
  return [dict(tokens=t) for t in tokens]
