"""Prompts and what follows them, as rows of which the completion alone is learned."""
import dataclasses

import numpy as np

from lean_jax.data import reading
from lean_jax.data.example_windows import arranged
from lean_jax.data.examples import Example
from lean_jax.data.text import parsed
from lean_jax.errors import InputError
from lean_jax.generation.text import encoded, is_chat, reads


def completions(model, data, *, length=None, prompt='prompt', completion='completion'):
  """The ExampleWindows of JSON lines such as `generated.write_data` writes, one a row.

  A prompt is read as `generate` reads it, and the completion with it, as one text; what is learned
  begins with the first token that the prompt alone does not have. The token that ends texts follows
  it, unless the line says 'finished': false. A row that is too long is left out.

  Args:
    model: a `lean_jax.Model`, a decoder: of its tokenizer and context.
    data: a path, or a list of dicts.
    length: tokens a row; None is the longest row that the context has room for.
    prompt, completion: the keys.

  Raises:
    InputError: a line without them, or no row that is short enough.
  """
  if reads(model):
    raise InputError(f'a {model.family.model_type} reads a source and writes a target; completions '
                     'are for decoders')
  most = length or model.config.context
  if not 2 <= most <= model.config.context:
    raise InputError(f'rows of {length} tokens; give 2 to {model.config.context}, the context')
  if not isinstance(data, list):
    data = [parsed(line, f'{data}:{k}') for k, line in enumerate(reading.lines(data), 1)
            if line.strip()]
  found = []
  for k, line in enumerate(data):
    if (not isinstance(line, dict) or prompt not in line
        or not isinstance(line.get(completion), str)):
      raise InputError(f'line {k} has no {prompt!r}, or no text {completion!r}; give dicts with '
                       'both')
    ids, begin = _joined(model, line[prompt], line[completion])
    if line.get('finished', True) and model.tokenizer.ends:
      ids = np.append(ids, np.int32(model.tokenizer.ends[0]))
    if begin < len(ids) <= most:
      found.append(Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= begin))
  if not found:
    raise InputError(f'none of {len(data)} lines has a completion within {most} tokens; give a '
                     'greater length, or shorter prompts')
  rows = arranged(found, most, packed=False)
  return rows if length is None else _filled(rows, length)


def _filled(rows, length):
  """ExampleWindows of one example a row, with room up to a length."""
  more = lambda x, value: np.pad(x, ((0, 0), (0, length - rows.length)), constant_values=value)
  return dataclasses.replace(rows, array=more(rows.array, 0), segments=more(rows.segments, 0),
                             labels=more(rows.labels, -1))


def _joined(model, prompt, completion):
  """The ids of both, and the place of the first that the prompt alone does not have."""
  before = encoded(model, prompt)
  text = model.tokenizer.chat(prompt) if is_chat(prompt) else prompt
  ids = (model.tokenizer.encode(text + completion) if is_chat(prompt)
         else encoded(model, text + completion))
  same = min(len(before), len(ids))
  differs = np.flatnonzero(before[:same] != ids[:same])
  return ids, int(differs[0]) if differs.size else same
