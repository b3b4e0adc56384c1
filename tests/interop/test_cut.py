"""A model that was cut computes in transformers what it computes here; ULD in PyTorch."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

import lean_jax as lean  # noqa: E402
from lean_jax.distillation.uld import reading, uld  # noqa: E402
from lean_jax.models.decoder import DecoderConfig  # noqa: E402
from lean_jax.models.families import FAMILIES  # noqa: E402
from lean_jax.nn.attention import AttentionOptions  # noqa: E402

pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.slow]
TOKENS = np.random.default_rng(0).integers(0, 200, (2, 10))
BASE = DecoderConfig(vocabulary=280, width=32, layers=4, heads=4, groups=2, head_width=8,
                     hidden=48, context=64)


@pytest.mark.parametrize(('kind', 'config'), [
    ('llama', BASE),
    ('qwen3', dataclasses.replace(BASE, attention=AttentionOptions(norm='head'), tied=False)),
    ('gemma', dataclasses.replace(BASE, norm_offset=1., embedding_scale=32 ** .5, mlp=dataclasses
                                  .replace(BASE.mlp, activation='gelu_tanh')))])
def test_a_cut_model_is_the_same_in_transformers(tiny_model, tmp_path, kind, config):
  (tmp_path / 'text.txt').write_text('the quick brown fox jumps over the lazy dog\n' * 40)
  config = dataclasses.replace(config, vocabulary=tiny_model.config.vocabulary)
  params = jax.jit(config.module.init)(jax.random.key(0), TOKENS)['params']
  model = lean.Model(FAMILIES[kind], config, params, tiny_model.tokenizer)
  cuts = dict(layers=2, hidden=24, heads=1, groups=1) | (
      dict(width=16) if config.embedding_scale == 1 else {})
  small = lean.cut(model, tmp_path / 'text.txt', window=16, samples=8, **cuts)
  lean.save(small, tmp_path / 'out', format='hf')
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  with torch.no_grad():
    want = theirs(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(small.logits(TOKENS), want, atol=2e-5)


def test_uld_is_the_l1_distance_of_sorted_probabilities_in_pytorch():
  draw = np.random.default_rng(1)
  y, z = (draw.normal(size=(1, 9, n)).astype(np.float32) for n in (13, 8))
  ours, theirs = torch.tensor(y, requires_grad=True), torch.tensor(z)
  q, p = (torch.softmax(x[0, :-1], -1).sort(-1, descending=True).values for x in (ours, theirs))
  want = (q - torch.nn.functional.pad(p, (0, 5))).abs().sum(-1).mean()
  want.backward()
  tokens = dict(tokens=jnp.zeros((1, 9), jnp.int32))
  counted = jnp.ones((1, 9)).at[0, -1].set(0)
  read = lambda x: reading(x, lambda rows: rows, tokens, counted, 'positions')
  got, grad = jax.value_and_grad(lambda y: uld(read(y), read(jnp.asarray(z))))(jnp.asarray(y))
  np.testing.assert_allclose(got, want.item(), rtol=1e-6)
  np.testing.assert_allclose(grad, ours.grad.numpy(), atol=1e-7)
