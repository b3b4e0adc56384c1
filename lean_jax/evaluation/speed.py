"""Tokens a second and bytes of generation; docs/evaluation.md has the protocol."""
import statistics
import time

import jax
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation import loop

_GREEDY = (None, None, None)                 # no key, no temperature, no top_p
_NO_END = np.zeros((0,), np.int32)


def speed(module, params, *, prompt, decode, batch, repeats=3):
  """How fast the programs of `generate` run, greedy, and the memory they take.

  Args:
    module: a decoder.
    params: its parameters, of any kinds of weights.
    prompt: tokens of each prompt.
    decode: tokens written after each prompt, 2 or more; the first is the prefill's.
    batch: prompts at once.
    repeats: timed runs, after one that is not; the median counts.

  Returns:
    dict: prefill_tokens_per_second and decode_tokens_per_second, of the whole batch;
    peak_memory_bytes, of the larger of the two programs on one device; device_peak_bytes, the
    most that the device ever held in this process, None where it does not say.

  Raises:
    InputError: a number below its least, or more tokens than the context has.
  """
  check(module.config, prompt, decode, batch, repeats)
  ids = jax.device_put(prompts(module.config, batch, prompt, decode))
  first, rest = programs(module, params, ids, prompt, decode)
  times = []
  for _ in range(1 + repeats):
    (held, cache), before = timed(first, params, ids, prompt, *_GREEDY)
    _, after = timed(rest, params, held, cache, prompt + 1, prompt + decode, *_GREEDY, _NO_END)
    times.append((before, after))
  before, after = (statistics.median(column) for column in zip(*times[1:]))
  return dict(prefill_tokens_per_second=batch * prompt / before,
              decode_tokens_per_second=batch * (decode - 1) / after,
              peak_memory_bytes=max(footprint(first), footprint(rest)),
              device_peak_bytes=(jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'))


def programs(module, params, ids, prompt, decode):
  """The compiled prefill and loop of `generate` for these ids."""
  first = loop.prefill.lower(module, params, ids, prompt, *_GREEDY, top_k=None,
                             padded=loop.bucket(prompt, module.config.context))
  held, cache = first.out_info
  rest = loop.decode.lower(module, params, held, cache, prompt + 1, prompt + decode, *_GREEDY,
                           _NO_END, top_k=None)
  return first.compile(), rest.compile()


def timed(program, *args):
  """What a program gives and the seconds until all of it is there."""
  started = time.perf_counter()
  out = jax.block_until_ready(program(*args))
  return out, time.perf_counter() - started


def footprint(program):
  """Bytes of a compiled program: arguments, temporaries and outputs, shared ones once."""
  m = program.memory_analysis()
  return (m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
          - m.alias_size_in_bytes)


def prompts(config, batch, prompt, decode):
  """Prompts of tokens counted up, and room for what follows: [B S]."""
  ids = np.zeros((batch, loop.bucket(prompt + decode, config.context)), np.int32)
  ids[:, :prompt] = np.arange(batch * prompt).reshape(batch, prompt) % config.vocabulary
  return ids


def check(config, prompt, decode, batch, repeats):
  """Raises InputError for a number out of its range."""
  for name, value, least in (('prompt', prompt, 1), ('decode', decode, 2), ('batch', batch, 1),
                             ('repeats', repeats, 1)):
    if value < least:
      raise InputError(f'{name} {value}; give {least} or more')
  if prompt + decode > config.context:
    raise InputError(f'prompts of {prompt} tokens and {decode} after them are {prompt + decode}, '
                     f'the context has {config.context}; give fewer')
