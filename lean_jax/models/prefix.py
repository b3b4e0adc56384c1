"""What stands before every text: keys and values of each layer, learned or of a soft prompt.

An encoder and a decoder has a prefix before its target and a soft prompt before its source.
"""
import dataclasses

import jax.numpy as jnp

from lean_jax.errors import InputError
from lean_jax.models.segments import replaced, unstacked
from lean_jax.weights.beside import Prefix, Prompt

PLACES = ('prefix', 'prompt')   # where in a stack's parameters; a prompt's tokens are embeddings
SIDES = dict(prefix='decoder', prompt='encoder')     # and of which stack, where there are two


def prefix_of(module, params):
  """The Prefix of a stack; None where it has none.

  A soft prompt is one too: causal layers make its keys and values of it alone, whatever the text.
  Others do not, and `Stack.prompted` puts it before the text itself.

  Args:
    module: a stack.
    params: its parameters.

  Raises:
    InputError: a prefix of another number of layers, heads or widths.
  """
  config, found = module.config, params.get('prefix')
  if found is None and not ('prompt' in params and config.causal):
    return None
  prefix = found.plain() if found is not None else of_prompt(module, params, params['prompt'])
  N, _, G, K = prefix.k.shape
  if (config.layers, config.groups, config.head_width) != (N, G, K):
    raise InputError(f'a prefix of {N} layers, {G} key heads of {K}; the model has '
                     f'{config.layers}, {config.groups} of {config.head_width}: attach it anew')
  return prefix


def of_prompt(module, params, prompt):
  """The Prefix that a Prompt is to the tokens after it."""
  config = dataclasses.replace(module.config, cache=None)
  rest = {k: v for k, v in params.items() if k not in PLACES}
  arrays = type(module)(config, parent=None).apply({'params': rest}, prompt.value,
                                                   method='cache_of')
  each, P = unstacked(config, arrays), prompt.length
  whole = lambda name: jnp.stack([layer[name].reshape(config.groups, P, config.head_width)
                                  .swapaxes(0, 1) for layer in each])
  return Prefix(whole('k'), whole('v'))                                # [N P G K] each


def settled(module, params):
  """The params with what makes a prefix computed once: a prompt, or an MLP's."""
  if 'encoder/' in module.config.stacks:
    found = params['decoder'].get('prefix')
    return params if found is None else put(module.config, params, 'prefix', found.plain())
  if not any(name in params for name in PLACES) or isinstance(params.get('prefix'), Prefix):
    return params
  rest = {k: v for k, v in params.items() if k not in PLACES}
  return {**rest, 'prefix': prefix_of(module, params)}


def put(config, params, name, value):
  """The params with a 'prefix' or a 'prompt'."""
  path = [SIDES[name]] if 'encoder/' in config.stacks else []
  return replaced(params, path, lambda own: {**own, name: value})


def has_prefix(config, params):
  """Whether anything stands before every text."""
  stacks = [params[side.rstrip('/')] if side else params for side in config.stacks]
  return any(name in stack for stack in stacks for name in PLACES)


def length_of(params):
  """How many tokens stand before every text that is written."""
  own = params.get(SIDES['prefix'], params)
  return sum(own[name].length for name in PLACES if name in own)


def source_prompt(params):
  """How many tokens stand before every source of an encoder and a decoder."""
  found = params.get(SIDES['prompt'], {}).get('prompt')
  return 0 if found is None else found.length


def check_takes_prefix(config, kind):
  """Raises InputError for a model that nothing can stand before."""
  alone, config = 'encoder/' not in config.stacks, config.decoding
  other = sorted({l.mixer for l in config.each} - {'attention'})
  if other:
    raise InputError(f'a prefix is keys and values of attention, and {" and ".join(other)} layers '
                     'have none; use lora, or bottlenecks')
  if config.renewals:
    raise InputError('no prefix stands before positions that turn otherwise past a length '
                     '(LongRoPE); use lora, or bottlenecks')
  if kind is Prompt and alone and not config.causal:
    raise InputError('a soft prompt before a model that sees all tokens at once depends on them; '
                     'use a prefix')
