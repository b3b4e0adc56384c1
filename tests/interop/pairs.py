"""What must hold of encoder-decoders: the checks of parity.py with a source and a target."""
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.generation import generate
from lean_jax.interop.hf import load_hf, save_hf
from lean_jax.models.cache import empty_cache
from tests.interop.parity import VOCABULARY, B, T, close, made, tokens_and_mask

U = 13                                        # tokens of a target


def pair(side):
  """A source and its mask, padded on a side; a target and its mask, padded on the right."""
  target = np.random.default_rng(2).integers(3, VOCABULARY, (B, U))
  lengths = np.array([U - 4, U, U - 7])
  return *tokens_and_mask(side), target, np.arange(U)[None] < lengths[:, None]


def their_logits(model, source, target, mask=None, target_mask=None):
  """float32 logits of transformers."""
  import torch
  masks = dict(attention_mask=mask, decoder_attention_mask=target_mask)
  how = {k: torch.tensor(v.astype(np.int64)) for k, v in masks.items() if v is not None}
  with torch.no_grad():
    return model(torch.tensor(source), decoder_input_ids=torch.tensor(target),
                 **how).logits.float().numpy()


def our_logits(config, params, source, target, mask=None, target_mask=None):
  """Ours."""
  run = jax.jit(lambda p, *given: config.module.apply({'params': p}, *given)[0])
  return np.asarray(run(params, jnp.asarray(source), jnp.asarray(target), mask, target_mask))


def check_logits(row):
  """Whole rows, and sources and targets with padding, give the logits of transformers."""
  model, (_, config, params, _), _ = made(row)
  source, _, target, _ = pair('right')
  found = [close(our_logits(config, params, source, target), their_logits(model, source, target),
                 row.bound)]
  for side in ('right', 'left') if row.left else ('right',):
    source, mask, target, target_mask = pair(side)
    given = source, target, mask, target_mask
    found.append(close(our_logits(config, params, *given), their_logits(model, *given), row.bound,
                       target_mask))
  return max(found)


def check_cache(row):
  """A target in pieces, through the cache, gives the whole's logits; the source is read once."""
  _, (_, config, params, _), _ = made(row)
  source, mask, target, target_mask = pair('right')
  whole = our_logits(config, params, source, target, mask, target_mask)
  run = jax.jit(lambda p, *given: config.module.apply({'params': p}, *given))
  cache, parts = empty_cache(config, B, U + 8, T + 3), []
  for start, end in ((0, 4), (4, 9), *((k, k + 1) for k in range(9, U))):
    here = (jnp.asarray(source), mask) if start == 0 else (None, None)
    logits, cache = run(params, here[0], jnp.asarray(target[:, start:end]), here[1],
                        target_mask[:, start:end], cache, start)
    parts.append(logits)
  return close(np.concatenate(parts, axis=1), whole, 1e-5, target_mask)


def check_generate(row):
  """32 greedy tokens are those of transformers."""
  import torch
  model, (_, config, params, _), _ = made(row)
  source = np.random.default_rng(1).integers(3, VOCABULARY, (2, 7))
  theirs = model.generate(torch.tensor(source), max_new_tokens=32, do_sample=False,
                          eos_token_id=None, pad_token_id=0)[:, 1:]
  np.testing.assert_array_equal(generate(config.module, params, source, tokens=32), theirs)


def check_save(row):
  """What we save, transformers loads, and computes the very same logits."""
  import transformers
  model, (family, config, params, hf), _ = made(row)
  source, _, target, _ = pair('right')
  with tempfile.TemporaryDirectory() as folder:
    save_hf(folder, family, config, params, hf)
    cls = getattr(transformers, row.model)
    again, info = cls.from_pretrained(folder, output_loading_info=True)
  wrong = {k: info[f'{k}_keys'] for k in ('missing', 'unexpected', 'mismatched')}
  assert not any(wrong.values()), wrong
  np.testing.assert_array_equal(their_logits(again.eval(), source, target),
                                their_logits(model, source, target))
  for k in ('decoder_start', 'forced_bos', 'forced_eos'):
    name = f'{k}_token_id'
    assert getattr(again.generation_config, name) == getattr(model.generation_config, name), name


def check_bfloat16(row):
  """bfloat16 runs, and is no further from float32 than twice what transformers' own is."""
  import torch
  import transformers
  model, _, folder = made(row)
  source, _, target, _ = pair('right')
  _, half, narrow, _ = load_hf(folder, dtype='bfloat16')
  wide = their_logits(model, source, target)
  theirs = getattr(transformers, row.model).from_pretrained(folder, dtype=torch.bfloat16).eval()
  away = lambda logits: np.sqrt(np.mean((logits - wide) ** 2) / np.mean(wide ** 2))
  ours = away(our_logits(half, narrow, source, target))
  allowed = 2 * away(their_logits(theirs, source, target))
  assert ours < allowed, f'{ours:.3f} of the scale, twice that of transformers is {allowed:.3f}'
  return ours


def check_unrolled(row):
  """Layers written out give the logits of layers stacked."""
  _, (_, config, params, _), folder = made(row)
  source, _, target, _ = pair('right')
  _, other, unrolled, _ = load_hf(folder, scan_layers=False)
  close(our_logits(other, unrolled, source, target), our_logits(config, params, source, target),
        1e-5)


CHECKS = (check_logits, check_cache, check_generate, check_save, check_bfloat16, check_unrolled)
