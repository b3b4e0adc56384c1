"""Texts with labels or scores of labels, for classifiers.

A row is a dict: `text`, a string or a pair of them, or `words`, a list, for one label a word;
`label`, a name, or a list with one for each word (None for none); `scores`, {name: number}, or a
list of these: logits or log-probabilities of all labels, whose softmax is what a teacher thinks.
A file is JSONL of rows; a line with `labelled_by` says where they are from.
"""
import hashlib
import json
import pathlib

import numpy as np

from lean_jax.data.padded import stacked
from lean_jax.data.rows import RowBatches
from lean_jax.errors import InputError

FIELDS = {'text', 'words', 'label', 'scores'}


def rows_of(data):
  """The rows of a JSONL file, or of a list, each as the module's docstring has it.

  Raises:
    InputError: no file or no rows, or one that is none.
  """
  if isinstance(data, str | pathlib.Path):
    try:
      lines = pathlib.Path(data).read_text(encoding='utf-8').splitlines()
      data = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
      raise InputError(f'{str(data)!r} is no JSONL file of rows ({error}); give one, or a list of '
                       'dicts') from error
  out = [row for row in data if not (isinstance(row, dict) and 'labelled_by' in row)]
  for row in out:
    if not isinstance(row, dict) or not row.keys() <= FIELDS or ('text' in row) == ('words' in row):
      raise InputError(f'a row is {row!r:.80}; expected dict(text=...) or dict(words=[...]), with '
                       'label or scores')
  if not out:
    raise InputError('no rows; give one or more, dict(text=..., label=...) say')
  return out


def texts_of(rows, head):
  """What a head reads of rows: texts, or for 'token' lists of words."""
  field = 'words' if head == 'token' else 'text'
  for row in rows:
    if field not in row:
      raise InputError(f'a row is {row!r:.80}, and the model has a head of each '
                       f'{"word" if head == "token" else "text"}; expected {field!r} in it')
  return [row[field] for row in rows]


def targets(rows, labels, token):
  """Labels and scores of rows, as arrays.

  Args:
    rows: of `rows_of`.
    labels: all labels' names.
    token: whether they are of words.

  Returns:
    [int32 labels, [] or [W] each, -1 for none], [float32 scores, [C] or [W C] each, NaN for none].

  Raises:
    InputError: another name, a score that lacks or is no number, or another count than of words.
  """
  number, out = {name: k for k, name in enumerate(labels)}, ([], [])
  for row in rows:
    W = len(row['words']) if token else 1
    many = lambda x, W=W: [None] * W if x is None else x if token else [x]
    names, scores = many(row.get('label')), many(row.get('scores'))
    if not len(names) == len(scores) == W:
      raise InputError(f'a row is {row!r:.80}; expected a label or scores for each of its {W} '
                       'words')
    odd = [n for n in names if n is not None and n not in number]
    if odd:
      raise InputError(f'a row has label {odd[0]!r}; the model has: {", ".join(labels)}')
    found = np.array([_scored(s, labels) for s in scores], np.float32)
    one = np.array([-1 if n is None else number[n] for n in names], np.int32)
    out[0].append(one if token else one[0])
    out[1].append(found if token else found[0])
  return out


def _scored(scores, labels):
  if scores is None:
    return [np.nan] * len(labels)
  if not isinstance(scores, dict) or scores.keys() != set(labels):
    raise InputError(f'scores {scores!r:.80}; expected a number for each of: {", ".join(labels)}')
  values = [scores[name] for name in labels]
  if not all(isinstance(x, int | float) and np.isfinite(x) for x in values):
    raise InputError(f'scores {scores!r:.80}; expected finite numbers')
  return values


def scored_by(teacher, rows, head, truncate):
  """Rows with the logits of a classifier as scores."""
  texts, names = texts_of(rows, head), teacher.labels
  named = lambda logits: dict(zip(names, logits.tolist())) if np.isfinite(logits).all() else None
  if head == 'token':
    return [row | dict(scores=[named(word) for word in own])
            for row, own in zip(rows, teacher.tag(texts, truncate=truncate))]
  return [row | dict(scores=named(own))
          for row, own in zip(rows, teacher.classify(texts, truncate=truncate))]


def share(labels, scores, temperature, soft_weight):
  """The weight of scores, checked against what there is; None is what suits it."""
  known = any((np.asarray(x) >= 0).any() for x in labels)
  soft = any(np.isfinite(x).any() for x in scores)
  if not known and not soft:
    raise InputError('no row has a label or scores; give some, or a teacher')
  if not temperature > 0:
    raise InputError(f'temperature {temperature} is not positive; 1 to 4 are usual')
  if soft_weight is None:
    return .7 if known and soft else float(soft)
  if not 0 <= soft_weight <= 1 or (soft_weight > 0 and not soft) or (soft_weight < 1 and not known):
    raise InputError(f'soft_weight {soft_weight} of rows {"with" if known else "without"} labels '
                     f'and {"with" if soft else "without"} scores; expected 0 to 1, of what there '
                     'is')
  return soft_weight


def figures(logits, labels):
  """accuracy, nll and count over labels [n], -1 for none, of logits [n C]; in float64."""
  here = (labels >= 0) & np.isfinite(logits).all(axis=1)
  if not here.any():
    raise InputError('no row has a label; give some to compare with')
  x, y = logits[here].astype(np.float64), labels[here]
  x = x - x.max(axis=1, keepdims=True)
  log_p = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)))[np.arange(len(y)), y]
  return dict(accuracy=float((x.argmax(axis=1) == y).mean()), nll=float(-log_p.mean()),
              count=int(here.sum()))


def batches(encoded, labels, scores, *, batch, seed, context, by_length=False):
  """RowBatches of rows that were encoded.

  A batch has tokens, mask and token_types [B T]; labels, int32 [B] or [B T], -1 for none; scores,
  [B C] or [B T C], and scored, [B] or [B T], 1 where there are any. Labels of words are at the
  first token of each: specials, padding and words' other tokens have none.

  Args:
    encoded: [(ids, types)], or with a third part for words: the place of each one's first token.
    labels, scores: of `targets`.
    batch, seed: of RowBatches.
    context: tokens of the longest row.
    by_length: whether rows of a batch are of about one length.
  """
  C = scores[0].shape[-1]

  def placed(which, T):
    out = np.full((len(which), T), -1, np.int32), np.full((len(which), T, C), np.nan, np.float32)
    for row, k in enumerate(which):
      at = encoded[k][2]
      for whole, own in zip(out, (labels[k], scores[k])):
        whole[row, at[at >= 0]] = own[at >= 0]
    return out

  def make(which):
    given = stacked([encoded[k][:2] for k in which], len(which), context)
    if len(encoded[0]) > 2:
      wanted, target = placed(which, given['tokens'].shape[1])
    else:
      wanted, target = (np.stack([x[k] for k in which]) for x in (labels, scores))
    return given | dict(labels=wanted, scores=np.nan_to_num(target),
                        scored=np.isfinite(target[..., 0]).astype(np.float32))
  digest = hashlib.blake2b(digest_size=16)
  for parts in zip(encoded, labels, scores):
    for x in (*parts[0], *parts[1:]):
      digest.update(np.asarray(x).tobytes() + b'|')
  return RowBatches(len(encoded), batch, seed, make, digest.hexdigest(),
                    np.array([len(row[0]) for row in encoded]) if by_length else None)
