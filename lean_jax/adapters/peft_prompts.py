"""Prefixes and soft prompts in the files of the PEFT library: one tensor, prompt_embeddings.

Of a prompt it is [P D]; of a prefix [P N*2*G*K], each layer's keys and then its values.
"""
import jax.numpy as jnp
import numpy as np

from lean_jax.errors import InputError
from lean_jax.weights.beside import Prefix, Prompt

TENSOR = 'prompt_embeddings'
# P-tuning (Liu et al. 2021, arXiv:2103.10385) makes a prompt by a network that PEFT does not save.
READS = dict(PREFIX_TUNING='prefix', PROMPT_TUNING='prompt', P_TUNING='prompt')


def written(config, kind):
  """adapter_config.json's own part, and the tensors, of a Prefix, a DeepPrefix or a Prompt."""
  N, G, K = config.layers, config.groups, config.head_width
  if not config.causal:
    raise InputError('PEFT files have prefixes of decoders; save the model, format lean')
  if isinstance(kind, Prompt):
    settings = dict(peft_type='PROMPT_TUNING', token_dim=config.width, prompt_tuning_init='RANDOM',
                    num_attention_heads=config.heads)
    value = kind.value
  else:
    plain = kind.plain()
    settings = dict(peft_type='PREFIX_TUNING', token_dim=G * K, num_attention_heads=G,
                    encoder_hidden_size=G * K, prefix_projection=False)
    value = jnp.stack([plain.k, plain.v]).transpose(2, 1, 0, 3, 4)      # [P N 2 G K]
    value = value.reshape(kind.length, N * 2 * G * K)
  settings |= dict(task_type='CAUSAL_LM', num_layers=N, num_virtual_tokens=kind.length,
                   num_transformer_submodules=1)
  return settings, {TENSOR: np.asarray(value, np.float32)}


def read(config, hf, found, folder):
  """{'prefix' or 'prompt': what a file has}; args: adapter_config.json, {name: array}, the folder.

  Raises:
    InputError: the tensor is missing or of another model.
  """
  name = READS[hf['peft_type']]
  P, N, G, K = hf.get('num_virtual_tokens'), config.layers, config.groups, config.head_width
  shape = (P, N * 2 * G * K) if name == 'prefix' else (P, config.width)
  shapes = {n: x.shape for n, x in found.items()}
  if shapes != {TENSOR: shape}:
    raise InputError(f'{folder} has tensors {shapes}, and a {name} of {P} for this model is '
                     f'{TENSOR} {shape}; give the model that it was made for')
  value = jnp.asarray(found[TENSOR], jnp.float32)
  if name == 'prompt':
    return dict(prompt=Prompt(value))
  kv = value.reshape(P, N, 2, G, K).transpose(2, 1, 0, 3, 4)
  return dict(prefix=Prefix(kv[0], kv[1]))
