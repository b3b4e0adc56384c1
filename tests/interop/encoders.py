"""What must hold of encoders: the checks of parity.py for the outputs of a head, or of none."""
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.interop.hf import load_hf, save_hf
from tests.interop.parity import B, T, close, made, tokens_and_mask


def padded(config, side):
  """Tokens [B T], a mask with padding on that side, and token types where a model has them."""
  tokens, mask = tokens_and_mask(side)
  tokens = np.where(mask, tokens, max(config.position_offset - 1, 0))  # RoBERTa's padding
  types = np.random.default_rng(3).integers(0, config.token_types, (B, T)) if (
      config.token_types > 1) else None
  return tokens, mask, types


def their_outputs(model, tokens, mask=None, types=None, positions=None):
  """float32 outputs of transformers: logits, or hidden states."""
  import torch
  given = dict(attention_mask=mask, token_type_ids=types, position_ids=positions)
  given = {k: torch.tensor(v.astype(np.int64)) for k, v in given.items() if v is not None}
  with torch.no_grad():
    out = model(torch.tensor(tokens), **given)
  return getattr(out, 'logits', out[0]).float().numpy()


def our_outputs(config, params, tokens, mask=None, types=None):
  """Ours."""
  run = jax.jit(lambda p, *given: config.module.apply({'params': p}, *given)[0])
  return np.asarray(run(params, jnp.asarray(tokens), mask, types))


def check_outputs(row):
  """Whole rows, and rows padded on the right, give what transformers gives."""
  model, (_, config, params, _), _ = made(row)
  tokens, mask, types = padded(config, 'right')
  whole, _ = tokens_and_mask('right')
  found = [close(our_outputs(config, params, whole), their_outputs(model, whole), row.bound),
           close(our_outputs(config, params, tokens, mask, types),
                 their_outputs(model, tokens, mask, types), row.bound, _where(config, mask))]
  return max(found)


def check_left(row):
  """Rows padded on the left give what transformers gives, of each token; else what the right does.

  Of a whole row transformers takes the first token, were it padding.
  """
  model, (_, config, params, _), _ = made(row)
  tokens, mask, types = padded(config, 'left')
  ours = our_outputs(config, params, tokens, mask, types)
  if config.head != 'sequence' or config.reads == 'mean':
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0) + config.position_offset
    theirs = their_outputs(model, tokens, mask, types, positions)
    return close(ours, theirs, row.bound, _where(config, mask))
  rolled = lambda x: x if x is None else np.stack(
      [np.roll(r, n) for r, n in zip(x, mask.sum(axis=1))])
  right = our_outputs(config, params, rolled(tokens), rolled(mask), rolled(types))
  return close(ours, right, 1e-5, _where(config, mask))


def check_pooler(row):
  """The pooler's vectors are those of transformers."""
  import torch
  model, (_, config, params, _), _ = made(row)
  tokens, mask, _ = padded(config, 'right')
  with torch.no_grad():
    theirs = model(torch.tensor(tokens), torch.tensor(mask.astype(np.int64))).pooler_output.numpy()

  def run(p):
    x, _ = config.module.apply({'params': p}, jnp.asarray(tokens), mask=mask, method='hidden')
    return config.module.apply({'params': p}, x, mask, method='pooled')
  return close(np.asarray(jax.jit(run)(params)), theirs, row.bound)


def check_save(row):
  """What we save, transformers loads, and computes the very same outputs, labels included."""
  import transformers
  model, (family, config, params, hf), _ = made(row)
  tokens, mask, types = padded(config, 'right')
  with tempfile.TemporaryDirectory() as folder:
    save_hf(folder, family, config, params, hf)
    cls = getattr(transformers, row.model)
    again, info = cls.from_pretrained(folder, output_loading_info=True)
  wrong = {k: info[f'{k}_keys'] for k in ('missing', 'unexpected', 'mismatched')}
  assert not any(wrong.values()), wrong
  np.testing.assert_array_equal(their_outputs(again.eval(), tokens, mask, types),
                                their_outputs(model, tokens, mask, types))
  if config.labels:
    assert again.config.id2label == model.config.id2label == dict(enumerate(config.labels))
    assert again.config.label2id == model.config.label2id


def check_bfloat16(row):
  """bfloat16 runs, and is no further from float32 than twice what transformers' own is."""
  import torch
  import transformers
  model, _, folder = made(row)
  tokens, _ = tokens_and_mask('right')
  _, half, narrow, _ = load_hf(folder, dtype='bfloat16')
  wide = their_outputs(model, tokens)
  theirs = getattr(transformers, row.model).from_pretrained(folder, dtype=torch.bfloat16).eval()
  away = lambda outputs: np.sqrt(np.mean((outputs - wide) ** 2) / np.mean(wide ** 2))
  ours, allowed = away(our_outputs(half, narrow, tokens)), 2 * away(their_outputs(theirs, tokens))
  assert ours < allowed, f'{ours:.3f} of the scale, twice that of transformers is {allowed:.3f}'
  return ours


def check_unrolled(row):
  """Layers written out give the outputs of layers stacked."""
  _, (_, config, params, _), folder = made(row)
  tokens, _ = tokens_and_mask('right')
  _, other, unrolled, _ = load_hf(folder, scan_layers=False)
  close(our_outputs(other, unrolled, tokens), our_outputs(config, params, tokens), 1e-5)


def _where(config, mask):
  return None if config.head == 'sequence' else mask


CHECKS = (check_outputs, check_left, check_save, check_bfloat16, check_unrolled)
