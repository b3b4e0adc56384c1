"""Ours against the original implementation, where torch and transformers are installed."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.generation import generate
from lean_jax.interop.hf import load_hf, save_hf
from lean_jax.models.decoder import Decoder

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

# Their warnings are not ours to mend.
pytestmark = pytest.mark.filterwarnings('ignore')

VARIANTS = {
    'grouped, tied': dict(num_key_value_heads=2, tie_word_embeddings=True),
    'grouped, untied': dict(num_key_value_heads=2, tie_word_embeddings=False),
    'one group, wide heads': dict(num_key_value_heads=1, head_dim=22, tie_word_embeddings=False),
    'all heads, narrow heads': dict(num_key_value_heads=4, head_dim=6, tie_word_embeddings=True,
                                    rope_theta=500_000., rms_norm_eps=1e-3),
}
PROMPT = [3, 14, 15, 92, 65, 35, 89]


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def theirs(request):
  torch.manual_seed(0)
  config = transformers.LlamaConfig(**dict(
      vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3,
      num_attention_heads=4, max_position_embeddings=64, initializer_range=.3, eos_token_id=2,
      bos_token_id=1) | request.param)
  return transformers.LlamaForCausalLM(config).eval()


def logits_of(model, tokens):
  with torch.no_grad():
    return model(torch.tensor(tokens)).logits.float().numpy()


def assert_same(ours, theirs):
  # float32, sums in another order: measured 6e-6 of the largest logit at most.
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_logits_and_greedy_text_are_those_of_the_original(theirs, tmp_path):
  theirs.save_pretrained(tmp_path)
  _, config, params, _ = load_hf(tmp_path)
  tokens = np.random.default_rng(0).integers(0, 97, (2, 50))
  ours, _ = jax.jit(Decoder(config).apply)({'params': params}, jnp.asarray(tokens))
  assert_same(ours, logits_of(theirs, tokens))
  wanted = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=32, do_sample=False,
                           eos_token_id=None)[0, len(PROMPT):]
  assert generate(Decoder(config), params, PROMPT, tokens=32).tolist() == wanted.tolist()


def test_what_we_save_is_loaded_by_transformers(theirs, tmp_path):
  theirs.save_pretrained(tmp_path / 'theirs')
  family, config, params, hf = load_hf(tmp_path / 'theirs')
  (tmp_path / 'ours').mkdir()
  save_hf(tmp_path / 'ours', family, config, params, hf)
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'ours', output_loading_info=True)
  assert not any(info[f'{kind}_keys'] for kind in ('missing', 'unexpected', 'mismatched'))
  assert (again.config.bos_token_id, again.config.eos_token_id) == (1, 2)
  assert again.dtype == torch.float32
  np.testing.assert_array_equal(logits_of(again, [PROMPT]), logits_of(theirs, [PROMPT]))


def test_shards_are_read_as_one_model(theirs, tmp_path):
  theirs.save_pretrained(tmp_path / 'one')
  theirs.save_pretrained(tmp_path / 'many', max_shard_size='20KB')
  assert not (tmp_path / 'many' / 'model.safetensors').exists()
  family, config, params, hf = load_hf(tmp_path / 'many')
  jax.tree.map(np.testing.assert_array_equal, params, load_hf(tmp_path / 'one')[2])
  (tmp_path / 'ours').mkdir()
  save_hf(tmp_path / 'ours', family, config, params, hf, max_shard_size='20KB')
  assert not (tmp_path / 'ours' / 'model.safetensors').exists()
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
  np.testing.assert_array_equal(logits_of(again, [PROMPT]), logits_of(theirs, [PROMPT]))


def test_a_model_in_bfloat16_is_read(theirs, tmp_path):
  theirs.to(torch.bfloat16).save_pretrained(tmp_path)
  _, config, params, _ = load_hf(tmp_path)
  ours, _ = jax.jit(Decoder(config).apply)({'params': params}, jnp.array([PROMPT]))
  # Read again: `.float()` would leave the rotary frequencies rounded to bfloat16.
  wide = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  assert_same(ours, logits_of(wide, [PROMPT]))
