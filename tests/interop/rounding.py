"""Tiny models whose layers are rounded, and what their formats must keep."""
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np

import lean_jax as lean
from lean_jax import tree
from lean_jax.data.tokenizer import train_bpe
from lean_jax.models.families import FAMILIES

IDS = np.arange(2, 22)[None]
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False)
OTHER = dict(
    gpt2=dict(n_embd=64, n_layer=2, n_head=2, n_positions=32),
    mixtral=dict(num_local_experts=2, num_experts_per_tok=1),
    phi3=dict(pad_token_id=0, bos_token_id=1, eos_token_id=2))


@functools.cache
def floats(family, **change):
  """A random model of a family, its layers stacked."""
  tokenizer = train_bpe(['the quick brown fox jumps over the lazy dog\n' * 20], 280)
  hf = (SIZES if family != 'gpt2' else {}) | OTHER.get(family, {}) | change | dict(
      model_type=family, vocab_size=tokenizer.size)
  family = FAMILIES[family]
  config = family.from_hf(hf)
  like = jax.eval_shape(config.module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  rng = np.random.default_rng(0)
  one = lambda x: jnp.asarray(rng.normal(size=x.shape) * .1 + (x.ndim < 3), jnp.float32)
  return lean.Model(family, config, jax.tree.map(one, like['params']), tokenizer, hf)


@functools.cache
def model(family, scheme, **change):
  """The same, rounded."""
  return lean.quantize(floats(family, **change), scheme, where='layers/(attention|mlp|moe/exp).*')


def exact(m):
  """The model with scales that float16 has."""
  one = lambda w: dataclasses.replace(w, scale=w.scale.astype(jnp.float16))
  return dataclasses.replace(m, params=tree.transform(
      m.params, [('layers/(att|mlp|moe/e).*', one)]))


def specs(m):
  """{name: scheme} of the rounded weights."""
  return {name: str(w.spec) for name, w in tree.named_weights(m.params).items()
          if hasattr(w, 'spec')}


def same(one, other):
  """Asserts that two trees have the same codes, scales and floats."""
  a, b = (tree.named_arrays(m.params) for m in (one, other))
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(np.asarray(a[name], np.float32), np.asarray(b[name], np.float32),
                                  name)


def their_logits(folder, **how):
  """What plain transformers computes with a folder."""
  import torch
  import transformers
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=how.pop('dtype', torch.float32), **how).eval()
    with torch.no_grad():
      return theirs(torch.tensor(IDS)).logits.float().numpy()
