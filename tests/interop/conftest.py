"""A tiny Hugging Face folder, written without our own code."""
import json

import numpy as np
import pytest
import safetensors.numpy

CONFIG = dict(
    architectures=['LlamaForCausalLM'], model_type='llama', vocab_size=12, hidden_size=8,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=6,
    intermediate_size=10, max_position_embeddings=16, rms_norm_eps=1e-5, hidden_act='silu',
    attention_bias=False, mlp_bias=False, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    rope_parameters=dict(rope_type='default', rope_theta=500.), dtype='float32')


def tensors_of(hf):
  """Random tensors, as transformers names and shapes them."""
  D, F, V = hf['hidden_size'], hf['intermediate_size'], hf['vocab_size']
  Q, K = (hf[f'num_{kind}_heads'] * hf['head_dim'] for kind in ('attention', 'key_value'))
  layer = {'self_attn.q_proj': (Q, D), 'self_attn.k_proj': (K, D), 'self_attn.v_proj': (K, D),
           'self_attn.o_proj': (D, Q), 'mlp.gate_proj': (F, D), 'mlp.up_proj': (F, D),
           'mlp.down_proj': (D, F), 'input_layernorm': (D,), 'post_attention_layernorm': (D,)}
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)} | {
      f'model.layers.{k}.{name}.weight': shape
      for k in range(hf['num_hidden_layers']) for name, shape in layer.items()}
  if not hf['tie_word_embeddings']:
    shapes['lm_head.weight'] = (V, D)
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def tiny_folder(tmp_path):
  """The function (changes of config.json, change of the tensors) -> (folder, tensors)."""
  def write(config=None, edit=None):
    hf = CONFIG | (config or {})
    tensors = tensors_of(hf)
    tensors = (edit(tensors) or tensors) if edit else tensors
    folder = tmp_path / 'tiny'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(hf))
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    return folder, tensors
  return write
