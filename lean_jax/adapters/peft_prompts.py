"""Prefixes and soft prompts in the files of the PEFT library: one tensor, prompt_embeddings.

Of a prompt it is [P D]; of a prefix [P N*2*G*K], each layer's keys and then its values.

Of an encoder and a decoder a prompt stands before the source, and may have 2 P rows, of which PEFT
uses the first P. A prefix stands before the target, in the decoder's attention to itself. PEFT
0.21 takes four arrays of the file for each layer, the last two for attention to the source, and
then drops these: layer n has the keys and values of the file's layer 2 n, counted anew from 0 at
its end. What peft trains of an even number of layers is so half of them, each twice; what is
written here has twice as many layers as the decoder, and its own at the even ones.
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
  pair, config = 'encoder/' in config.stacks, config.decoding
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
    if pair:
      value = jnp.stack([value, jnp.zeros_like(value)], axis=2)         # [P N 2 2 G K]
      N = 2 * N
    value = value.reshape(kind.length, N * 2 * G * K)
  settings |= dict(task_type='SEQ_2_SEQ_LM' if pair else 'CAUSAL_LM', num_layers=N,
                   num_virtual_tokens=kind.length,
                   num_transformer_submodules=1 + (pair and not isinstance(kind, Prompt)))
  return settings, {TENSOR: np.asarray(value, np.float32)}


def read(config, hf, found, folder):
  """'prefix' or 'prompt', and what a file has.

  Args:
    config: of the model.
    hf: adapter_config.json.
    found: {name: array}.
    folder: named in errors.

  Raises:
    InputError: the tensor is missing or of another model.
  """
  name, pair, config = READS[hf['peft_type']], 'encoder/' in config.stacks, config.decoding
  P, N, G, K = hf.get('num_virtual_tokens'), config.layers, config.groups, config.head_width
  twice, layers = pair and hf.get('num_transformer_submodules') != 1, N
  if pair and name == 'prefix':
    layers = hf.get('num_layers')
    if not twice:
      raise InputError(f'{folder} has a prefix of one stack (num_transformer_submodules is 1), and '
                       'this model has two; give one that was made for it')
  if not all(isinstance(n, int) and n > 0 for n in (P, layers)):
    raise InputError(f'{folder} has num_virtual_tokens {P!r} and num_layers {layers!r}; expected '
                     'numbers: write it again')
  shape = (P, layers * 2 * G * K) if name == 'prefix' else (P * (1 + twice), config.width)
  shapes = {n: x.shape for n, x in found.items()}
  if shapes != {TENSOR: shape}:
    raise InputError(f'{folder} has tensors {shapes}, and a {name} of {P} for this model is '
                     f'{TENSOR} {shape}; give the model that it was made for')
  value = jnp.asarray(found[TENSOR], jnp.float32)
  if name == 'prompt':
    return name, Prompt(value[:P])
  kv = value.reshape(P, layers, 2, G, K).transpose(2, 1, 0, 3, 4)      # [2 N P G K]
  if pair:
    kv = kv[:, 2 * np.arange(N) % layers]
  return name, Prefix(kv[0], kv[1])
