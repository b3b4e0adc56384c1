"""Sequence-level data: texts that a teacher writes after prompts, kept where they are good.

Kim & Rush 2016 (arXiv:1606.07947), section 3.2: a student that learns from the teacher's own texts
learns its mode. With an answer to check, the n samples of a prompt that reach it are kept, which is
rejection sampling (Yuan et al. 2023, RFT, arXiv:2308.01825, section 3.3).
"""
import collections
import hashlib
import inspect
import json
import os
import pathlib

from lean_jax import files
from lean_jax.data import reading
from lean_jax.data.text import parsed
from lean_jax.distillation import answers
from lean_jax.distillation.duplicates import Seen, normalised
from lean_jax.errors import InputError
from lean_jax.generation.sampling import checked
from lean_jax.generation.text import encoded, truncated, write
from lean_jax.training.digest import fingerprint

GRAM = 4                      # words of a gram whose repetitions count
CHECKS = dict(gsm8k=answers.gsm8k)
REASONS = ('unfinished', 'short', 'long', 'repetitive', 'filtered', 'wrong', 'same', 'alike')


def repetition(text):
  """The part of a text's grams of `GRAM` words that came before in it: seq-rep-4 of Welleck et al.
  2019 (arXiv:1908.04319, section 6).
  """
  words = normalised(text)
  grams = [tuple(words[k:k + GRAM]) for k in range(len(words) - GRAM + 1)]
  return 1 - len(set(grams)) / len(grams) if grams else 0.


def write_data(teacher, prompts, out, *, tokens=256, temperature=1., n=1, batch=16, seed=0,
               least=1, most=None, finished=True, most_repetition=.5, keep=None, answer=None,
               field='prompt', reference='answer', progress=None, **sampling):
  """Writes what a teacher says after prompts to a JSONL file, but for what is not kept.

  Lines are dict(prompt, completion, index, sample, tokens, finished); `completions` reads them for
  training. A call that was killed is made again and goes on: the file ends with the same bytes as
  if nothing had happened. What is done is in a file beside it, .progress after its name.

  Args:
    teacher: a `lean_jax.Model`.
    prompts: a list of texts or conversations, or of dicts that have one in `field`; or a path of
      JSON lines of such.
    out: the file.
    tokens: of a completion, at most, the one that ends it included.
    temperature: 0 takes the most probable tokens; n is then 1.
    n: samples of a prompt.
    batch: prompts at a time, all their samples with them.
    seed: of the samples.
    least, most: tokens of a completion that is kept; None for any number.
    finished: whether one that goes on to its last token is left out.
    most_repetition: see `repetition`; 1 keeps all.
    keep: a function of a completion, False where it is left out.
    answer: 'gsm8k', or a function (completion, reference) that says whether it is right, of prompts
      that are dicts; None checks nothing.
    field, reference: the keys of such a dict.
    progress: called with prompts done, prompts in all, and what part is kept.
    sampling: top_k, top_p, min_p, repetition_penalty and stop, of `generation.text.write`.

  Returns:
    dict: prompts, samples, kept; acceptance, the part of the checked answers that was right, None
    where none was checked; answered, the part of the prompts that have a line; and of `REASONS` how
    many samples were left out for each, the first that holds.

  Raises:
    InputError: a setting out of range, a prompt without what is needed, or a file that another call
      wrote, or that was changed since.
  """
  rows, check = _prompts(prompts, field), answer
  if isinstance(answer, str):
    check = CHECKS.get(answer)
    if check is None:
      raise InputError(f'answer {answer!r}; give {", ".join(CHECKS)}, or a function')
  if min(n, batch, least) < 1 or not 0 <= most_repetition <= 1:
    raise InputError(f'n {n}, batch {batch}, least {least}, most_repetition {most_repetition}; '
                     'give 1 or more of the first three, and a part from 0 to 1')
  if most is not None and most < least:
    raise InputError(f'at least {least} tokens and at most {most}; give a most that is no less')
  checked(temperature, **{k: v for k, v in sampling.items() if k != 'stop'})
  lengths = [encoded(teacher, row['prompt']) for row in rows]
  long = [k for k, ids in enumerate(lengths) if len(truncated(teacher, ids, tokens)) < len(ids)]
  if long:
    raise InputError(f'prompt {long[0]} has {len(lengths[long[0]])} tokens, which leaves no room '
                     f'for {tokens} in the context, nor do {len(long) - 1} others; leave them out, '
                     'or give fewer tokens')
  lacking = next((k for k, row in enumerate(rows) if check and reference not in row), None)
  if lacking is not None:
    raise InputError(f'prompt {lacking} has no {reference!r} to check an answer by; give one, or '
                     'its key as reference=')

  def fault(text, size, row):
    """The first reason that holds but those of duplicates; None of a completion that is fine."""
    reasons = dict(
        unfinished=lambda: finished and size >= tokens,
        short=lambda: size < least or not text.strip(),
        long=lambda: most is not None and size > most,
        repetitive=lambda: repetition(text) > most_repetition,
        filtered=lambda: keep is not None and not keep(text),
        wrong=lambda: check is not None and not check(text, row[reference]))
    return next((name for name, holds in reasons.items() if holds()), None)

  settings = dict(
      teacher=fingerprint(teacher.params), tokenizer=teacher.tokenizer.fingerprint,
      prompts=_digest(rows), tokens=tokens, temperature=temperature, n=n, batch=batch, seed=seed,
      least=least, most=most, finished=finished, most_repetition=most_repetition,
      keep=_code(keep), answer=_code(check), reference=reference, **sampling)
  log, seen = _Log(pathlib.Path(out), settings), Seen()
  for line in log.lines:
    seen.add(_group(line['prompt']), line['completion'])
  for start in range(log.done, len(rows), batch):
    some = rows[start:start + batch]
    written = write(teacher, [row['prompt'] for row in some], tokens=tokens,
                    temperature=temperature, n=n, seed=_seed(seed, start), **sampling)
    lines, counts = [], collections.Counter(prompts=len(some))
    for index, (row, texts, sizes) in enumerate(zip(some, written.texts, written.counts), start):
      before = len(lines)
      for sample, (text, size) in enumerate(zip(texts, sizes)):
        reason = fault(text, size, row) or seen.add(_group(row['prompt']), text)
        counts[reason or 'kept'] += 1
        if reason is None:
          lines.append(dict(prompt=row['prompt'], completion=text, index=index, sample=sample,
                            tokens=size, finished=size < tokens))
      counts['answered'] += len(lines) > before
    log.add(lines, counts, start + len(some))
    if progress:
      progress(log.done, len(rows), f'{log.counts["kept"]} of {log.done * n} kept')
  return _report(log.counts, n, check is not None)


def _report(counts, n, check):
  """What `write_data` returns, of its counts."""
  right = sum(counts[k] for k in ('kept', 'same', 'alike'))
  of = right + counts['wrong']
  return dict(prompts=counts['prompts'], samples=counts['prompts'] * n, kept=counts['kept'],
              acceptance=right / of if check and of else None,
              answered=counts['answered'] / counts['prompts'], **{r: counts[r] for r in REASONS})


class _Log:
  """A file of lines, and beside it one that says how far it is good.

  Lines of a batch are on disk before the line that counts them is written, so that a file is
  good up to the bytes of the last whole line of its log.

  Attributes:
    lines: that are in the file.
    done: prompts that are done.
    counts: sums over those.
  """

  def __init__(self, path, settings):
    self._path, self._beside = path, path.with_name(f'{path.name}.progress')
    self.done, self.counts, self.lines = 0, collections.Counter(), []
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(settings, sort_keys=True)
    if not self._beside.exists():
      if path.exists():
        raise InputError(f'{path} is there, and not what this call makes; name another file')
      files.write_text(self._beside, head + '\n')
    whole = self._beside.read_bytes().split(b'\n')[:-1]                   # half a line is none
    if not whole:
      raise InputError(f'{self._beside} is not what this call wrote; remove it and {path}')
    self._check(head, whole[0].decode())
    entries = [parsed(x, self._beside) for x in whole[1:]]
    size = entries[-1]['bytes'] if entries else 0
    for entry in entries:
      self.counts.update(entry['counts'])
      self.done = entry['done']
    data = path.read_bytes() if path.exists() else b''
    self._digest = hashlib.blake2b(data[:size], digest_size=16)
    if len(data) < size or (entries and self._digest.hexdigest() != entries[-1]['digest']):
      raise InputError(f'{path} was changed since it was written; remove it and {self._beside}, '
                       'or name another file')
    for name, length in ((path, size), (self._beside, sum(len(x) + 1 for x in whole))):
      if name.exists():
        os.truncate(name, length)
    self._size = size
    self.lines = [json.loads(x) for x in data[:size].splitlines()]

  def add(self, lines, counts, done):
    """Writes the lines of a batch, and that they are there."""
    data = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in lines).encode()
    self._append(self._path, data)
    self._digest.update(data)
    self._size += len(data)
    self.done = done
    self.counts.update(counts)
    entry = dict(done=done, bytes=self._size, digest=self._digest.hexdigest(), counts=counts)
    self._append(self._beside, (json.dumps(entry) + '\n').encode())

  def _append(self, path, data):
    try:
      with open(path, 'ab') as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      if files.no_space(error):
        raise InputError(f'no space left on the disk of {path}: free some; the same call then goes '
                         'on') from error
      raise InputError(f'{path} cannot be written: {error.strerror}; name a place that '
                       'can') from error

  def _check(self, mine, found):
    mine, found = json.loads(mine), parsed(found.encode(), self._beside)
    odd = sorted(k for k in mine.keys() | found.keys() if mine.get(k) != found.get(k))
    if odd:
      raise InputError(f'{self._path} was written with another {odd[0]} ({found.get(odd[0])}, now '
                       f'{mine.get(odd[0])}); name another file')


def _prompts(prompts, field):
  """[dict with 'prompt'] of what a user gives."""
  if isinstance(prompts, str | os.PathLike):
    prompts = [parsed(line, f'{prompts}:{k}') for k, line in enumerate(reading.lines(prompts), 1)
               if line.strip()]
  rows = [dict(prompt=x) if not isinstance(x, dict) else x for x in prompts]
  for k, row in enumerate(rows):
    if isinstance(prompts[k], dict):
      if field not in row:
        raise InputError(f'prompt {k} has no {field!r}; choose one of: '
                         f'{", ".join(map(repr, row))}')
      rows[k] = dict(row, prompt=row[field])
  if not rows:
    raise InputError('no prompts; give one or more')
  return rows


def _group(prompt):
  return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _digest(rows):
  try:
    text = json.dumps(rows, sort_keys=True)
  except (TypeError, ValueError) as error:
    raise InputError(f'prompts of more than texts, numbers, lists and dicts ({error}); give '
                     'those') from error
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _seed(seed, start):
  """Of a batch: a number of 31 bits that no other batch or seed near by has."""
  return int.from_bytes(hashlib.blake2b(f'{seed} {start}'.encode(), digest_size=4).digest(),
                        'little') >> 1


def _code(function):
  """What stands for a function in settings: its code, so that another one is another run."""
  if function is None:
    return None
  try:
    code = inspect.getsource(function)
  except (OSError, TypeError):                        # of no file, or no plain function
    code = getattr(function, '__qualname__', type(function).__qualname__)
  return hashlib.blake2b(code.encode(), digest_size=8).hexdigest()
