"""A generator as a labeller: how likely it finds each label after a prompt."""
import functools
import hashlib
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from lean_jax.data.labelled import rows_of
from lean_jax.data.packed import check_reads_text
from lean_jax.errors import InputError
from lean_jax.evaluation.texts import run
from lean_jax.training.digest import fingerprint

EVERY = 64                    # texts between two writes


def label(model, texts, labels, *, prompt, out=None, batch=16):
  """Rows of texts with the label that a generator finds likeliest, and the scores of all.

  The score of a label is log p(its string | the prompt), in nats, the sum over its tokens: those
  of prompt and string together from the first on that the prompt alone has not. Their softmax are
  the soft labels. For one label a word, give lists of words, and a prompt with {word} in it.

  Args:
    model: a `lean_jax.Model`, a decoder.
    texts: strings, or lists of words.
    labels: {name: the string that follows the prompt}; or strings, whose names are without spaces.
    prompt: has {text} in it, which the text (the words, with spaces) takes the place of.
    out: a JSONL file to write; the same call goes on with one that was not finished.
    batch: prompts at a time; changes memory and speed, not the result.

  Returns:
    rows as `data.labelled` has them: [dict(text=, label=, scores={name: nats})].

  Raises:
    InputError: a prompt without {text}, fewer than two labels, a label that is no token by itself,
      a text that the context has no room for, or a file of another call.
  """
  check_reads_text(model)
  if not isinstance(labels, dict):
    labels = {name.strip(): name for name in labels}
  texts = list(texts)
  words = bool(texts) and not isinstance(texts[0], str)
  _check(texts, labels, prompt, words)
  rows, file = [], None
  if out is not None:
    facts = json.dumps([texts, labels, prompt]).encode()
    told = dict(labelled_by=dict(
        model=fingerprint(model.params), tokenizer=model.tokenizer.fingerprint, prompt=prompt,
        labels=labels, content=hashlib.blake2b(facts, digest_size=16).hexdigest()))
    rows, file = _resumed(pathlib.Path(out), told)
  try:
    for start in range(len(rows), len(texts), EVERY):
      new = _rows(model, texts[start:start + EVERY], labels, prompt, words, batch)
      rows += new
      if file is not None:
        file.write(''.join(json.dumps(row) + '\n' for row in new).encode())
        file.flush()
        os.fsync(file.fileno())
  finally:
    if file is not None:
      file.close()
  return rows


def log_likelihoods(model, contexts, strings, batch=16):
  """log p(string | context), in nats, of each string after each context: [contexts strings]."""
  encoded = lambda texts: [_headed(model.tokenizer, ids)
                           for ids in model.tokenizer.encode_batch(texts)]
  before, rows = encoded(contexts), []
  for context, ids in zip(contexts, before):
    for string, whole in zip(strings, encoded([context + s for s in strings])):
      n = min(len(ids), len(whole))
      known = int(np.argmin(np.append(ids[:n] == whole[:n], False)))
      if not 0 < known < len(whole):
        raise InputError(f'the label {string!r} adds no token to {context[-30:]!r}, or follows '
                         'none; give other strings, a space before each say')
      if len(whole) > model.config.context:
        raise InputError(f'a prompt with its label has {len(whole)} tokens, the model reads '
                         f'{model.config.context}; shorten the text {context[:30]!r}...')
      rows.append((whole, (np.arange(len(whole)) >= known).astype(np.int32)))
  found = run(functools.partial(_sums, model.module), model.params, rows, batch, model.config, 1)
  return found.reshape(len(contexts), len(strings))


@functools.partial(jax.jit, static_argnums=0)
def _sums(module, params, given):
  """log p of the tokens that `token_types` marks, [B 1]."""
  tokens, counted = given['tokens'], given['token_types'][:, 1:]
  logits, _ = module.apply({'params': params}, tokens, mask=given['mask'])
  each = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
  return jnp.sum(each[..., 0] * counted, axis=1, keepdims=True)


def _headed(tokenizer, ids):
  head = tokenizer.head
  return ids if ids[:len(head)].tolist() == head else np.concatenate([np.int32(head), ids])


def _rows(model, texts, labels, prompt, words, batch):
  contexts = [_filled(prompt, text, word) for text in texts for word in (text if words else [''])]
  scores = log_likelihoods(model, contexts, list(labels.values()), batch).tolist()
  each = [dict(label=max(zip(row, labels))[1], scores=dict(zip(labels, row))) for row in scores]
  if not words:
    return [dict(text=text, **row) for text, row in zip(texts, each)]
  out, at = [], iter(each)
  for text in texts:
    own = [next(at) for _ in text]
    out.append(dict(words=list(text), label=[row['label'] for row in own],
                    scores=[row['scores'] for row in own]))
  return out


def _filled(prompt, text, word):
  given = dict(text=text if isinstance(text, str) else ' '.join(text), word=word)
  return re.sub(r'\{(text|word)\}', lambda m: given[m[1]], prompt)


def _check(texts, labels, prompt, words):
  if not texts:
    raise InputError('no texts to label; give one or more')
  kinds = (lambda t: isinstance(t, list | tuple) and all(isinstance(w, str) for w in t)) if words \
      else lambda t: isinstance(t, str)
  odd = [t for t in texts if not kinds(t)]
  if odd:
    raise InputError(f'a text is {odd[0]!r:.60}; expected strings, or lists of words, alike')
  if '{text}' not in prompt or ('{word}' in prompt) != words:
    raise InputError(f'prompt {prompt!r}; expected {{text}} in it' + (
        ', and {word}, the word that is labelled' if words else '; {word} is for lists of words'))
  if len(labels) < 2 or len(set(labels.values())) < len(labels):
    raise InputError(f'labels {labels!r}; expected two or more, with a string of their own each')


def _resumed(path, told):
  """The rows that a file has, and the file, open after them."""
  if path.exists():
    whole = path.read_bytes()
    whole = whole[:whole.rfind(b'\n') + 1]                    # a killed call may leave half a line
    lines = whole.splitlines()
    try:
      first = json.loads(lines[0]) if lines else told
    except ValueError:
      first = None
    if first != told:
      raise InputError(f'{str(path)!r} is there and not of this model, prompt, labels and texts; '
                       'name another file')
    if lines:
      file = path.open('r+b')
      file.truncate(len(whole))
      file.seek(0, os.SEEK_END)
      return rows_of([json.loads(line) for line in lines[1:]]) if lines[1:] else [], file
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('wb')
  except OSError as error:
    raise InputError(f'{str(path)!r} cannot be written ({error.strerror}); name a place that can'
                     ) from error
  file.write((json.dumps(told) + '\n').encode())
  file.flush()
  return [], file
