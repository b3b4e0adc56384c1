"""Tokens a second and bytes of generation; docs/evaluation.md has the protocol."""
import statistics
import time

import jax
import numpy as np

from lean_jax.errors import InputError
from lean_jax.generation import loop
from lean_jax.generation.sampling import Sampling
from lean_jax.generation.writer import written_out

_GREEDY = Sampling(), np.zeros((0,), np.int32)          # and no end token


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
  module, params = written_out(module, params)
  texts = jax.device_put(begin(module.config, batch, prompt, decode))
  first, rest = programs(module, params, texts, prompt)
  times = []
  for _ in range(1 + repeats):
    texts = jax.device_put(begin(module.config, batch, prompt, decode))
    read, before = timed(first, params, texts, *_GREEDY)
    _, after = timed(rest, params, read, prompt + decode, *_GREEDY)
    times.append((before, after))
  before, after = (statistics.median(column) for column in zip(*times[1:]))
  return dict(prefill_tokens_per_second=batch * prompt / before,
              decode_tokens_per_second=batch * (decode - 1) / after,
              peak_memory_bytes=max(footprint(first), footprint(rest)),
              device_peak_bytes=(jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'))


def programs(module, params, texts, prompt):
  """The compiled prefill and loop of `generate` for these texts."""
  first = loop.prefill.lower(module, params, texts, *_GREEDY,
                             padded=loop.bucket(prompt, module.config.context))
  rest = loop.decode.lower(module, params, first.out_info, 0, *_GREEDY)
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


def begin(config, batch, prompt, decode):
  """Prompts of tokens counted up, and room for what follows."""
  ids = np.arange(batch * prompt).reshape(batch, prompt) % config.vocabulary
  return loop.begin(ids, loop.bucket(prompt + decode, config.context))


def check(config, prompt, decode, batch, repeats):
  """Raises InputError for a number out of its range."""
  for name, value, least in (('prompt', prompt, 1), ('decode', decode, 2), ('batch', batch, 1),
                             ('repeats', repeats, 1)):
    if value < least:
      raise InputError(f'{name} {value}; give {least} or more')
  if prompt + decode > config.context:
    raise InputError(f'prompts of {prompt} tokens and {decode} after them are {prompt + decode}, '
                     f'the context has {config.context}; give fewer')
