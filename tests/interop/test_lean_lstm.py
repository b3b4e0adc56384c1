"""LSTM language models of ours, whose folders PyTorch's own nn.LSTM reads."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lean_jax.errors import InputError
from lean_jax.generation import generate
from lean_jax.interop.hf import load_hf, save_hf
from lean_jax.models.families import FAMILIES, family_of
from tests.interop import parity

SMALL = dict(model_type='lean_lstm', vocab_size=parity.VOCABULARY, hidden_size=32, lstm_size=24,
             num_hidden_layers=3, max_position_embeddings=64, eos_token_id=2)
KINDS = {'LSTMs alone, tied': {}, 'with MLPs, untied': dict(intermediate_size=40,
                                                            tie_word_embeddings=False)}


@pytest.fixture(scope='module', params=KINDS.values(), ids=KINDS)
def made(request, tmp_path_factory):
  """(family, config, params, folder) of a random model."""
  hf = SMALL | request.param
  family, folder = family_of(hf), tmp_path_factory.mktemp('lstm')
  config = family.from_hf(hf)
  params = jax.jit(config.module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + jnp.asarray(.2 * rng.normal(size=x.shape), x.dtype), params)
  save_hf(folder, family, config, params, hf)
  return family, config, params, folder


def their_logits(folder, tokens):
  """Logits of the folder's tensors, by PyTorch alone."""
  torch = pytest.importorskip('torch')
  from safetensors.torch import load_file
  hf = json.loads((folder / 'config.json').read_text())
  w = load_file(folder / 'model.safetensors')
  def norm(x, name):
    scale = w[f'{name}.weight']
    return torch.nn.functional.rms_norm(x, scale.shape, scale, hf['rms_norm_eps'])
  x = w['model.embed_tokens.weight'][torch.tensor(tokens)]
  for k in range(hf['num_hidden_layers']):
    at = f'model.layers.{k}'
    lstm = torch.nn.LSTM(hf['hidden_size'], hf['lstm_size'], batch_first=True)
    own = {n.removeprefix(f'{at}.lstm.'): v for n, v in w.items() if n.startswith(f'{at}.lstm.')}
    lstm.load_state_dict(own | dict(bias_hh_l0=torch.zeros(4 * hf['lstm_size'])))
    x = x + lstm(norm(x, f'{at}.input_layernorm'))[0] @ w[f'{at}.out_proj.weight'].T
    if hf['intermediate_size']:
      h = norm(x, f'{at}.post_attention_layernorm')
      gate, up, down = (w[f'{at}.mlp.{n}_proj.weight'].T for n in ('gate', 'up', 'down'))
      x = x + (torch.nn.functional.silu(h @ gate) * (h @ up)) @ down
  head = w.get('lm_head.weight', w['model.embed_tokens.weight'])
  return (norm(x, 'model.norm') @ head.T).detach().numpy()


def test_its_logits_are_those_of_pytorch(made):
  _, config, params, folder = made
  tokens, _ = parity.tokens_and_mask('right')
  parity.close(parity.our_logits(config, params, tokens), their_logits(folder, tokens), 2e-5)


def test_a_folder_gives_the_model_back(made):
  family, config, params, folder = made
  again = load_hf(folder)
  assert again[:2] == (family, config)
  jax.tree.map(np.testing.assert_array_equal, again[2], params)


def test_padding_and_the_cache_change_nothing(made):
  _, config, params, _ = made
  tokens, mask = parity.tokens_and_mask('left')
  got = parity.our_logits(config, params, tokens, mask)
  for b, row in enumerate(mask):
    parity.close(got[b:b + 1, row], parity.our_logits(config, params, tokens[b:b + 1, row]), 1e-5)


def test_greedy_tokens_are_those_of_whole_forward_passes(made):
  _, config, params, folder = made
  ids = np.random.default_rng(1).integers(3, parity.VOCABULARY, 7).tolist()
  new = generate(config.module, params, np.array(ids), tokens=32).tolist()
  for token in new:
    assert token == their_logits(folder, np.array([ids]))[0, -1].argmax()
    ids.append(token)


def test_layers_written_out_and_bfloat16_run(made):
  _, config, params, folder = made
  tokens, _ = parity.tokens_and_mask('right')
  want = parity.our_logits(config, params, tokens)
  _, other, unrolled, _ = load_hf(folder, scan_layers=False)
  parity.close(parity.our_logits(other, unrolled, tokens), want, 1e-5)
  _, half, narrow, _ = load_hf(folder, dtype='bfloat16')
  # eight bits of mantissa, through three layers
  parity.close(parity.our_logits(half, narrow, tokens), want, .05)


@pytest.mark.parametrize(('change', 'says'), [
    (dict(lstm_size=0), 'lstm_size'), (dict(lstm_size=None), 'lstm_size'),
    (dict(hidden_act='swoosh'), 'hidden_act'), (dict(intermediate_size=-1), 'intermediate_size'),
    (dict(quantization_config=dict(bits=4)), 'quantization_config')])
def test_what_is_not_computed_is_refused_by_its_name(change, says):
  with pytest.raises(InputError, match=says):
    FAMILIES['lean_lstm'].from_hf(SMALL | change)
