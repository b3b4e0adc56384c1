"""A row of the table of families: a tiny random model of transformers, and what must hold of ours.

A model is made once a process, saved by transformers itself and loaded by lean_jax.
"""
import dataclasses
import functools
import pathlib
import tempfile
import weakref
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.generation import generate
from lean_jax.interop.hf import load_hf, save_hf
from lean_jax.models.cache import empty_cache

VOCABULARY = 97
B, T = 3, 24


@dataclasses.dataclass(frozen=True)
class Row:
  """One architecture of a family.

  Attributes:
    family: model_type in config.json.
    what: what is special in this row.
    config: a function of the transformers module to a config; its vocabulary is VOCABULARY.
    model: the name of the class in transformers.
    bound: of the largest difference of logits, in parts of the largest logit.
    left: whether transformers takes position_ids, so that left padding can be compared too.
    tweak: called with the model of transformers before it is saved.
    checks: what must hold, functions of the row; () is all of `CHECKS`.
  """
  family: str
  what: str
  config: Callable
  model: str
  bound: float = 2e-5
  left: bool = True
  tweak: Callable = lambda model: None
  checks: tuple[Callable, ...] = ()

  @property
  def id(self):
    return f'{self.family}: {self.what}' if self.what else self.family


@functools.lru_cache(maxsize=2)
def made(row):
  """(their model, ours as `load_hf` gives it, the folder)."""
  import torch
  import transformers
  torch.manual_seed(0)
  model = getattr(transformers, row.model)(row.config(transformers)).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.ndim == 1:                       # norms and biases away from one and zero
        p.add_(.1 * torch.randn(p.shape))
  row.tweak(model)
  folder = tempfile.TemporaryDirectory()
  weakref.finalize(model, folder.cleanup)
  model.save_pretrained(folder.name)
  return model, load_hf(folder.name), pathlib.Path(folder.name)


def tokens_and_mask(side):
  """Random tokens, and a mask whose rows have other lengths."""
  tokens = np.random.default_rng(0).integers(3, VOCABULARY, (B, T))
  lengths = np.array([T, T - 5, T - 11])
  at = np.arange(T)[None]
  mask = at < lengths[:, None] if side == 'right' else at >= T - lengths[:, None]
  return tokens, mask


def their_logits(model, tokens, mask=None, positions=None):
  """float32 logits of transformers."""
  import torch
  how = {} if mask is None else dict(attention_mask=torch.tensor(mask.astype(np.int64)))
  if positions is not None:
    how['position_ids'] = torch.tensor(positions)
  with torch.no_grad():
    return model(torch.tensor(tokens), **how).logits.float().numpy()


def our_logits(config, params, tokens, mask=None):
  """Ours."""
  return np.asarray(_logits(config)(params, jnp.asarray(tokens), mask))


@functools.lru_cache(maxsize=4)
def _logits(config):
  return jax.jit(lambda p, t, m: config.module.apply({'params': p}, t, mask=m)[0])


def close(ours, theirs, bound, mask=None):
  """Asserts that logits are equal but for `bound` times the largest, where the mask is True."""
  keep = np.ones(ours.shape[:2], bool) if mask is None else mask
  error = np.abs(ours - theirs)[keep].max() / np.abs(theirs[keep]).max()
  assert error < bound, f'largest difference {error:.2e} of the scale'
  return error


def check_logits(row):
  """Whole rows, and rows padded on either side, give the logits of transformers."""
  model, (_, config, params, _), _ = made(row)
  tokens, mask = tokens_and_mask('right')
  found = [close(our_logits(config, params, tokens), their_logits(model, tokens), row.bound)]
  found.append(close(our_logits(config, params, tokens, mask), their_logits(model, tokens, mask),
                     row.bound, mask))
  if row.left:
    tokens, mask = tokens_and_mask('left')
    at = np.maximum(mask.cumsum(axis=1) - 1, 0)
    found.append(close(our_logits(config, params, tokens, mask),
                       their_logits(model, tokens, mask, at), row.bound, mask))
  return max(found)


def check_cache(row):
  """Tokens in pieces, through the cache, left padding among them, give the whole's logits."""
  _, (_, config, params, _), _ = made(row)
  tokens, mask = tokens_and_mask('left')
  whole = our_logits(config, params, tokens, mask)
  run = jax.jit(lambda p, t, m, cache, at: config.module.apply(
      {'params': p}, t, cache, at, m))
  cache, parts = empty_cache(config, B, T + 8), []
  for start, end in ((0, 8), (8, 16), *((k, k + 1) for k in range(16, T))):
    logits, cache = run(params, jnp.asarray(tokens[:, start:end]), mask[:, start:end], cache, start)
    parts.append(logits)
  return close(np.concatenate(parts, axis=1), whole, 1e-5, mask)


def check_generate(row):
  """32 greedy tokens are those of transformers."""
  import torch
  model, (_, config, params, _), _ = made(row)
  prompt = np.random.default_rng(1).integers(3, VOCABULARY, 7)
  theirs = model.generate(torch.tensor(prompt[None]), max_new_tokens=32, do_sample=False,
                          eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
  assert generate(config.module, params, prompt, tokens=32).tolist() == theirs


def check_save(row):
  """What we save, transformers loads, and computes the very same logits."""
  import transformers
  model, (family, config, params, hf), _ = made(row)
  tokens, _ = tokens_and_mask('right')
  with tempfile.TemporaryDirectory() as folder:
    save_hf(folder, family, config, params, hf)
    cls = getattr(transformers, row.model)
    again, info = cls.from_pretrained(folder, output_loading_info=True)
  wrong = {k: info[f'{k}_keys'] for k in ('missing', 'unexpected', 'mismatched')}
  assert not any(wrong.values()), wrong
  np.testing.assert_array_equal(their_logits(again.eval(), tokens), their_logits(model, tokens))


def check_bfloat16(row):
  """bfloat16 runs, and is no further from float32 than twice what transformers' own is."""
  import torch
  import transformers
  model, _, folder = made(row)
  tokens, _ = tokens_and_mask('right')
  _, half, narrow, _ = load_hf(folder, dtype='bfloat16')
  wide = their_logits(model, tokens)
  cls = getattr(transformers, row.model)
  theirs = cls.from_pretrained(folder, dtype=torch.bfloat16).eval()
  away = lambda logits: np.sqrt(np.mean((logits - wide) ** 2) / np.mean(wide ** 2))
  ours, allowed = away(our_logits(half, narrow, tokens)), 2 * away(their_logits(theirs, tokens))
  assert ours < allowed, f'{ours:.3f} of the scale, twice that of transformers is {allowed:.3f}'
  return ours


def check_unrolled(row):
  """Layers written out give the logits of layers stacked."""
  _, (_, config, params, _), folder = made(row)
  tokens, _ = tokens_and_mask('right')
  _, other, unrolled, _ = load_hf(folder, scan_layers=False)
  close(our_logits(other, unrolled, tokens), our_logits(config, params, tokens), 1e-5)


CHECKS = dict(logits=check_logits, cache=check_cache, generate=check_generate, save=check_save,
              bfloat16=check_bfloat16, unrolled=check_unrolled)
